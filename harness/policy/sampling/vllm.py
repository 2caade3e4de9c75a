"""vLLM as a sampler: the same call as klab's own (`sample.py`), and the same kind of rollouts.

Every trajectory is a request; after an answer of the environment it goes on as a new one. Log-probabilities are those
that the sampler draws with (`processed_logprobs`: of the tempered distribution), or, where top-p cuts it at
temperature 1, those of the whole distribution (`raw_logprobs`). The engine is in this process, beside the trainer on
its GPU (`colocated_engine.py`), or a server (`server_engine.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from klab.grid.errors import UserError
from klab.grid.schema.sampler import Sampler
from klab.grid.user_code import is_installed
from klab.harness.policy.policy import Policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.categorical import UniformSlice, uniform_numbers
from klab.harness.policy.sampling.sampler import Environment, SamplingOptions
from klab.harness.policy.sampling.trajectory_builder import TrajectoryBuilder


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


class VllmSampler:
    """A `SampleFunction`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[Sequence[int]]],
        generators: Sequence[torch.Generator | UniformSlice],
        options: SamplingOptions,
        environment: Environment | None = None,
    ) -> list[Rollout]:
        rollouts = []
        for cell, listed in enumerate(prompts):
            builder = TrajectoryBuilder(policy, cell, listed, options, environment)
            ends = sorted(builder.eos_token_ids)
            with self.engine.holding(policy, cell):
                while not builder.finished:
                    unfinished = [i for i, goes_on in enumerate(builder.unfinished) if goes_on]
                    requests = [
                        Request(
                            builder.prompts[i // options.group_size] + builder.tokens[i],
                            options.max_new_tokens - builder.num_generated[i],
                        )
                        for i in unfinished
                    ]
                    completions = self.engine.complete(requests, options, ends, _seed(generators[cell], policy))
                    for i, completion in zip(unfinished, completions, strict=True):
                        builder.add_turn(i, completion.tokens, completion.logprobs)
            rollouts.append(builder.build())
        return rollouts


def _seed(generator: torch.Generator | UniformSlice, policy: Policy) -> int:
    """One seed for all the requests of a turn: a seed of each request's own makes vLLM draw them one by one."""
    return int(uniform_numbers(generator, 1, policy.device)[0, 0] * 2**31)


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


class _Running:
    """The one engine of this process: two would not fit beside each other."""

    settings: EngineSettings | None = None
    sampler: VllmSampler | None = None


def vllm_sampler(settings: EngineSettings) -> VllmSampler:
    """The process's engine, started anew unless the one that runs will do.

    Raises:
        UserError: vllm is not installed, there is no GPU, or the server is not there or not as it must be.
    """
    if _Running.settings is None or _Running.sampler is None or not _Running.settings.will_do(settings):
        close_engine()
        return keep_engine(_start(settings), settings)
    return _Running.sampler


def keep_engine(engine: Engine, settings: EngineSettings) -> VllmSampler:
    """Make an engine the process's."""
    _Running.sampler, _Running.settings = VllmSampler(engine), settings
    return _Running.sampler


def close_engine() -> None:
    """Free the process's engine, if there is one."""
    running, _Running.sampler, _Running.settings = _Running.sampler, None, None
    if running is not None:
        running.engine.close()


def _start(settings: EngineSettings) -> Engine:
    require_vllm()
    if not torch.cuda.is_available():
        raise UserError(
            "vllm needs a GPU, and this process sees none",
            key="training.sampler.engine",
            value="vllm",
            hint="Ask for one with resources.gpus, or choose the engine klab.",
        )
    if settings.sampler.url is None:
        from klab.harness.policy.sampling.colocated_engine import ColocatedEngine

        return ColocatedEngine(settings)
    from klab.harness.policy.sampling.server_engine import ServerEngine

    return ServerEngine(settings)


def require_vllm() -> None:
    """Check that vllm is installed.

    Raises:
        UserError: it is not.
    """
    if not is_installed("vllm"):
        raise UserError(
            "vllm is not installed",
            key="training.sampler.engine",
            value="vllm",
            hint="Install it with pip install 'klab[vllm]', or choose the engine klab.",
        )
