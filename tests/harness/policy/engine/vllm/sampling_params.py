"""A name that TRL imports of vLLM and klab does not use."""


class StructuredOutputsParams: ...
