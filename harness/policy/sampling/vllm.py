"""vLLM as a sampler: the same call as klab's own (`sample.py`), and the same kind of rollouts.

One engine per process, beside the trainer on its GPU. Before every rollout the policy is saved over the checkpoint
folder that the engine was started from, and the engine reloads it (`collective_rpc("reload_weights")`). Every
trajectory is a request with a seed of its own, so that sampling is repeatable as far as vLLM's arithmetic is; prefix
caching shares the prompts. After an answer of the environment, the trajectory goes on as a new request.

Log-probabilities are those of the tempered, full distribution: vLLM's raw ones at temperature 1, else its processed
ones (with the temperature, and with top-p, which must then be 1). Needs vllm 0.10.2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from klab.grid.errors import UserError
from klab.grid.user_code import is_installed
from klab.harness.policy.policy import Policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.categorical import UniformSlice, uniform_numbers
from klab.harness.policy.sampling.sampler import Environment, SamplingOptions
from klab.harness.policy.sampling.trajectory_builder import TrajectoryBuilder

GPU_MEMORY_UTILIZATION = 0.3
"""The engine's share of the GPU's memory: its weights and its cache."""


class LogProbability(Protocol):
    """`vllm.logprobs.Logprob`, as far as it is read here."""

    logprob: float


class Completion(Protocol):
    """`vllm.outputs.CompletionOutput`, as far as it is read here."""

    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, LogProbability]] | None


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


@lru_cache(maxsize=1)
def vllm_sampler(dtype: str | None) -> VllmSampler:
    """The process's engine, in this precision; that of the policy if None.

    Raises:
        UserError: vllm is not installed, or there is no GPU.
    """
    require_vllm()
    if not torch.cuda.is_available():
        raise UserError(
            "vllm needs a GPU, and this process sees none",
            key="training.sampler.engine",
            value="vllm",
            hint="Ask for one with resources.gpus, or choose the engine klab.",
        )
    return VllmSampler(dtype)


class VllmSampler:
    """A `SampleFunction`.

    Args:
        dtype: of the engine, the policy's if None.
    """

    def __init__(self, dtype: str | None) -> None:
        self._dtype = dtype
        self._engine: Any = None
        self._mode = ""
        self._home = TemporaryDirectory(prefix="klab-vllm-")

    def __call__(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[Sequence[int]]],
        generators: Sequence[torch.Generator | UniformSlice],
        options: SamplingOptions,
        environment: Environment | None = None,
    ) -> list[Rollout]:
        from vllm import SamplingParams

        rollouts = []
        for cell, listed in enumerate(prompts):
            mode = "raw_logprobs" if options.temperature == 1.0 else "processed_logprobs"
            engine = self._synchronised_engine(policy, cell, mode)
            builder = TrajectoryBuilder(policy, cell, listed, options, environment)
            while not builder.finished:
                unfinished = [i for i, goes_on in enumerate(builder.unfinished) if goes_on]
                uniforms = uniform_numbers(generators[cell], len(builder.unfinished), policy.device)
                seeds = (uniforms * 2**31).long().flatten().tolist()
                params = [
                    SamplingParams(
                        temperature=0.0 if options.greedy else options.temperature,
                        top_p=options.top_p,
                        seed=seeds[i],
                        max_tokens=options.max_new_tokens - builder.num_generated[i],
                        logprobs=0,
                        stop_token_ids=sorted(builder.eos_token_ids),
                        ignore_eos=True,
                        detokenize=False,
                    )
                    for i in unfinished
                ]
                requests = [
                    {"prompt_token_ids": builder.prompts[i // options.group_size] + builder.tokens[i]}
                    for i in unfinished
                ]
                outputs = engine.generate(requests, params, use_tqdm=False)
                for i, output in zip(unfinished, outputs, strict=True):
                    add_completion(builder, i, output.outputs[0])
            rollouts.append(builder.build())
        return rollouts

    def _synchronised_engine(self, policy: Policy, cell: int, mode: str) -> Any:
        """The engine with the weights of one cell."""
        folder = Path(self._home.name) / "policy"
        replace_checkpoint(policy, cell, folder)
        if self._engine is not None and mode == self._mode:
            self._engine.collective_rpc("reload_weights")
            self._engine.reset_prefix_cache()
            return self._engine
        from vllm import LLM

        self._engine = None  # its memory goes to the next one
        self._engine = LLM(
            model=str(folder),
            dtype=self._dtype or str(policy.dtype).removeprefix("torch."),
            seed=0,
            max_model_len=policy.context_length,
            gpu_memory_utilization=GPU_MEMORY_UTILIZATION,
            enable_prefix_caching=True,
            generation_config="vllm",
            logprobs_mode=mode,
        )
        self._mode = mode
        return self._engine


def add_completion(builder: TrajectoryBuilder, i: int, completion: Completion) -> None:
    """Add a completion of vLLM to a trajectory, with the log-probabilities that it was drawn with."""
    tokens = [int(token) for token in completion.token_ids]
    if completion.logprobs is None or len(completion.logprobs) != len(tokens):
        raise RuntimeError("vllm did not return a log-probability for every token")
    values = [float(each[token].logprob) for token, each in zip(tokens, completion.logprobs, strict=True)]
    builder.add_turn(i, tokens, values)


def replace_checkpoint(policy: Policy, cell: int, folder: Path) -> None:
    """Save one cell over the checkpoint in `folder`, file by file: readers that have an old file open keep it."""
    scratch = folder.with_name(folder.name + ".new")
    policy.save(scratch, cell)
    folder.mkdir(exist_ok=True)
    for file in scratch.iterdir():
        os.replace(file, folder / file.name)
