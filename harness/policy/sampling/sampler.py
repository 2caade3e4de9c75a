"""The interface of samplers: klab's own (`sample.py`) and vLLM (`vllm.py`) draw the same kind of rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from klab.harness.policy.categorical import UniformSlice
from klab.harness.policy.policy import Policy
from klab.harness.policy.rollout import Rollout

Environment = Callable[[int, int, str], str | None]
"""`environment(cell, trajectory, transcript)` -> the environment's answer once the policy has ended its turn, or None
to end the episode. The transcript is what both sides wrote after the prompt, without end-of-sequence tokens."""


@dataclass(frozen=True, slots=True)
class TranscribingEnvironment:
    """An environment, and the cells of which the texts of a rollout are transcripts, because their tasks score these;
    of the others, and with an `Environment` that is none of these, they are what the policy wrote.
    """

    answer: Environment
    transcribed: frozenset[int]

    def __call__(self, cell: int, trajectory: int, transcript: str) -> str | None:
        return self.answer(cell, trajectory, transcript)


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How to sample.

    Attributes:
        group_size: trajectories per prompt.
        max_new_tokens: limit of generated tokens per trajectory, end-of-sequence tokens included.
        temperature: divides the logits.
        top_p: draw from the smallest set of most likely tokens that holds this much probability.
        greedy: take the most likely token instead of drawing one.
        keeps_states: an update from the same weights follows: what it would compute again may be kept.
    """

    group_size: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False
    keeps_states: bool = False


class SampleFunction(Protocol):
    """Draws trajectories."""

    def __call__(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[Sequence[int]]],
        generators: Sequence[torch.Generator | UniformSlice],
        options: SamplingOptions,
        environment: Environment | None = None,
    ) -> list[Rollout]:
        """Sample `options.group_size` trajectories of every prompt of every cell.

        Args:
            prompts: token ids [C][P][length]; cells may differ in P ≥ 1, no prompt is empty.
            generators: one per cell, on the CPU; greedy sampling leaves them untouched.
            environment: answers when the policy ends a turn; without it, an end-of-sequence token ends the trajectory.

        Returns:
            one rollout per cell.
        """
        ...
