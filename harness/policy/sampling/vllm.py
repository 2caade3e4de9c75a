"""vLLM as a sampler: the same call as klab's own (`sample.py`), and the same kind of rollouts.

Every trajectory is a request; after an answer of the environment it goes on as a new one. Log-probabilities are those
that the sampler draws with (`processed_logprobs`: of the tempered distribution), or, where top-p cuts it at
temperature 1, those of the whole distribution (`raw_logprobs`). The engine is in this process, beside the trainer on
its GPU (`colocated_engine.py`), or a server (`server_engine.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from klab.grid.errors import UserError
from klab.grid.user_code import is_installed
from klab.harness.policy.categorical import UniformSlice, uniform_numbers
from klab.harness.policy.policy import Policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.engine import Engine, EngineSettings, Request
from klab.harness.policy.sampling.sampler import Environment, SamplingOptions
from klab.harness.policy.sampling.trajectory_builder import TrajectoryBuilder


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
