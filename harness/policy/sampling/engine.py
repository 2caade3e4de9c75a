"""The interface of inference engines that draw whole completions: vLLM in this process, or a server."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from klab.grid.schema.sampler import Sampler
from klab.harness.policy.policy import Policy
from klab.harness.policy.sampling.sampler import SamplingOptions


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence to go on with.

    Attributes:
        tokens: prompt, and what has been written so far.
        budget: most new tokens.
    """

    tokens: list[int]
    budget: int


@dataclass(frozen=True, slots=True)
class Completion:
    """New tokens, the end-of-sequence token included, and the log-probability of each under the sampler."""

    tokens: list[int]
    logprobs: list[float]


class Engine(Protocol):
    """Where vLLM runs."""

    def holding(self, policy: Policy, cell: int) -> AbstractContextManager[None]:
        """The engine with the weights of one cell, ready to draw; at the end it gives back what memory it can."""
        ...

    def complete(
        self, requests: Sequence[Request], options: SamplingOptions, end_tokens: Sequence[int], seed: int
    ) -> list[Completion]:
        """Go on with every sequence until one of `end_tokens` or its budget."""
        ...

    def close(self) -> None:
        """Free the engine's memory, or its connection."""
        ...


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is started with; another one needs another engine.

    Attributes:
        sampler: the grid's `training.sampler`.
        model, revision: folder or hub id that the policy came from.
        dtype: precision of the engine's weights, as torch names it.
        context: longest sequence, prompt included, in tokens.
        logprobs_mode: vLLM's name for which log-probabilities it returns.
        lora_rank: of the policy's adapters, 0 without.
    """

    sampler: Sampler
    model: str
    revision: str | None
    dtype: str
    context: int
    logprobs_mode: str
    lora_rank: int = 0

    def will_do(self, asked: EngineSettings) -> bool:
        """Whether an engine with these settings can do what is asked: a longer context is no hindrance."""
        return self.context >= asked.context and self == replace(asked, context=self.context)
