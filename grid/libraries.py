"""The optional libraries that a cell's numbers depend on: whose versions klab records beside torch's and its own.

A cell says by its settings which ones it uses, so that they are known before it is trained and wherever it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Settings = Mapping[str, Any]

_QUANTISED = ("load_in_8bit", "load_in_4bit")


def _section(settings: Settings, name: str) -> Settings:
    found = settings.get(name)
    return found if isinstance(found, Mapping) else {}


def _on_trl(cell: Settings) -> bool:
    return _section(cell, "training").get("engine") == "trl"


def _field(cell: Settings, name: str) -> Any:
    """A further field of `GRPOConfig` that a cell on TRL names."""
    return _section(_section(cell, "training"), "trl").get(name) if _on_trl(cell) else None


def _model_argument(cell: Settings, name: str) -> Any:
    given = _field(cell, "model_init_kwargs")
    return given.get(name) if isinstance(given, Mapping) else None


def _samples_with_vllm(cell: Settings) -> bool:
    return _section(_section(cell, "training"), "sampler").get("engine") == "vllm"


def _has_server(cell: Settings) -> bool:
    return _samples_with_vllm(cell) and bool(_section(_section(cell, "training"), "sampler").get("url"))


def _has_adapters(cell: Settings) -> bool:
    """Whether PEFT makes adapters, or may: klab's stacked engine has its own."""
    policy = _section(cell, "policy")
    outside = policy.get("name") == "hf" and policy.get("engine") != "stacked"
    return bool(policy.get("lora")) and (outside or _on_trl(cell))


def _is_quantised(cell: Settings) -> bool:
    settings, optimizer = _model_argument(cell, "quantization_config"), str(_field(cell, "optim") or "")
    kind = settings.get("quant_method", "bitsandbytes") if isinstance(settings, Mapping) else None
    if any(_model_argument(cell, name) for name in _QUANTISED) or kind == "bitsandbytes":
        return True
    return any(word in optimizer for word in ("8bit", "bnb", "paged"))


def _has_reward(cell: Settings, name: str) -> bool:
    terms = _section(cell, "task").get("reward")
    return isinstance(terms, list | tuple) and any(
        isinstance(term, Mapping) and term.get("name") == name for term in terms
    )


LIBRARIES: dict[str, Callable[[Settings], bool]] = {
    "trl": lambda cell: _on_trl(cell) or _has_server(cell),
    "accelerate": _on_trl,
    "peft": _has_adapters,
    "vllm": lambda cell: _samples_with_vllm(cell) and not _has_server(cell),
    "deepspeed": lambda cell: bool(_field(cell, "deepspeed")),
    "bitsandbytes": _is_quantised,
    "liger-kernel": lambda cell: bool(_field(cell, "use_liger_kernel")),
    "flash-attn": lambda cell: str(_model_argument(cell, "attn_implementation") or "").startswith("flash_attention"),
    "math-verify": lambda cell: _has_reward(cell, "math"),
    "sympy": lambda cell: _has_reward(cell, "math"),
    "reasoning-gym": lambda cell: _section(cell, "task").get("name") == "reasoning_gym",
    "verifiers": lambda cell: _section(cell, "task").get("name") == "verifiers",
}
"""Distribution -> whether a cell with these settings (as `Cell.resolved` has them) uses it. A server's vLLM is the
server's, and not known here."""


def needs_transformers(cell: Settings) -> bool:
    """Whether a cell's job may use transformers: all but those of klab's engine with a tiny policy and a reward that is
    no model."""
    task = _section(cell, "task")
    terms = task.get("reward")
    listed = terms if isinstance(terms, list | tuple) else ()
    by_model = any(isinstance(term, Mapping) and term.get("model") for term in listed)
    bare = _section(cell, "policy").get("name") == "tiny" and not _on_trl(cell)
    return not bare or by_model or task.get("name") == "proxy"


TITLES = {
    "torch": "PyTorch",
    "transformers": "Transformers",
    "trl": "TRL",
    "accelerate": "Accelerate",
    "peft": "PEFT",
    "vllm": "vLLM",
    "deepspeed": "DeepSpeed",
    "sympy": "SymPy",
}
"""How a paper writes the names of some."""


def libraries(cell: Settings, launcher: str | None = None) -> tuple[str, ...]:
    """The optional libraries that a cell uses, in the order of `LIBRARIES`.

    Args:
        cell: its settings as plain data.
        launcher: `distributed_type` of accelerate's configuration, where `resources.launcher` names one.
    """
    used = {name for name, uses in LIBRARIES.items() if uses(cell)}
    if _on_trl(cell) and launcher == "DEEPSPEED":
        used.add("deepspeed")
    return tuple(name for name in LIBRARIES if name in used)
