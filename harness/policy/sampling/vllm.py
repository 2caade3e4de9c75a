"""Rollouts from vLLM: the same call as `klab.harness.policy.sampling.sample.sample`, and the same rollouts.

One engine per process, next to the trainer on its GPU. Before every draw the policy is saved as a checkpoint folder,
the one that the engine was started from, and the engine loads it again (`collective_rpc("reload_weights")`). Every
trajectory is a request with a seed of its own, so that a rollout that is drawn again is drawn alike as far as vLLM
computes alike; prefix caching shares the prompts. Where the environment answers, the trajectory goes on as a new
request.

The log-probabilities are those of the tempered, full distribution: vLLM's raw ones at temperature 1, else its processed
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
from klab.harness.policy.sampling.trajectory_builder import Environment, TrajectoryBuilder

MEMORY = 0.3
"""The engine's share of the GPU's memory: its weights and its cache."""


class LogProbability(Protocol):
    """`vllm.logprobs.Logprob`, as far as it is read here."""

    logprob: float


class Completion(Protocol):
    """`vllm.outputs.CompletionOutput`, as far as it is read here."""

    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, LogProbability]] | None


def require_vllm() -> None:
    """Raises a UserError where vllm is not installed."""
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
    """Draws trajectories with vLLM; see `klab.harness.policy.sampling.sample.sample` for the arguments."""

    def __init__(self, dtype: str | None) -> None:
        self._dtype = dtype
        self._engine: Any = None
        self._mode = ""
        self._home = TemporaryDirectory(prefix="klab-vllm-")

    def __call__(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[Sequence[int]]],
        *,
        group_size: int,
        max_new_tokens: int,
        generators: Sequence[torch.Generator | UniformSlice],
        temperature: float = 1.0,
        top_p: float = 1.0,
        greedy: bool = False,
        environment: Environment | None = None,
    ) -> list[Rollout]:
        from vllm import SamplingParams

        found = []
        for cell, listed in enumerate(prompts):
            engine = self._synchronised(policy, cell, "raw_logprobs" if temperature == 1.0 else "processed_logprobs")
            draft = TrajectoryBuilder(policy, cell, [list(p) for p in listed], group_size, max_new_tokens, environment)
            while not draft.finished:
                going = [row for row, open_ in enumerate(draft.open) if open_]
                seeds = (
                    (uniform_numbers(generators[cell], len(draft.open), policy.device) * 2**31)
                    .long()
                    .flatten()
                    .tolist()
                )
                settings = [
                    SamplingParams(
                        temperature=0.0 if greedy else temperature,
                        top_p=top_p,
                        seed=seeds[row],
                        max_tokens=max_new_tokens - draft.spent[row],
                        logprobs=0,
                        stop_token_ids=sorted(draft.eos_token_ids),
                        ignore_eos=True,
                        detokenize=False,
                    )
                    for row in going
                ]
                asked = [{"prompt_token_ids": draft.prompts[row // group_size] + draft.written[row]} for row in going]
                answers = engine.generate(asked, settings, use_tqdm=False)
                for row, answer in zip(going, answers, strict=True):
                    write(draft, row, answer.outputs[0])
            found.append(Rollout.of(draft))
        return found

    def _synchronised(self, policy: Policy, cell: int, mode: str) -> Any:
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
            gpu_memory_utilization=MEMORY,
            enable_prefix_caching=True,
            generation_config="vllm",
            logprobs_mode=mode,
        )
        self._mode = mode
        return self._engine


def write(draft: TrajectoryBuilder, row: int, completion: Completion) -> None:
    """Put what vLLM wrote into a trajectory, with the log-probabilities that it drew with."""
    tokens = [int(token) for token in completion.token_ids]
    if completion.logprobs is None or len(completion.logprobs) != len(tokens):
        raise RuntimeError("vllm did not return a log-probability for every token")
    values = [float(each[token].logprob) for token, each in zip(tokens, completion.logprobs, strict=True)]
    draft.turn(row, tokens, values)


def replace_checkpoint(policy: Policy, cell: int, folder: Path) -> None:
    """Save one cell over the checkpoint in `folder`, file by file: whoever has the old ones open keeps them."""
    scratch = folder.with_name(folder.name + ".new")
    policy.save(scratch, cell)
    folder.mkdir(exist_ok=True)
    for file in scratch.iterdir():
        os.replace(file, folder / file.name)
