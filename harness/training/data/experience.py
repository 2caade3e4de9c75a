"""One cell's rollout with everything that its updates need."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from klab.grid.schema.sections import Sampler
from klab.harness.policy.rollout import Rollout
from klab.harness.training.data.dynamic_sampling import SamplingStats


@dataclass(slots=True)
class Experience:
    """One cell's rollout with everything that its updates need; N = prompts × group_size trajectories, T the longest.

    Attributes:
        number: which rollout of the cell, from 0.
        rollout: tokens, masks and the behaviour policy's log-probabilities as the sampler kept them.
        rewards, correct: float [N], the task's.
        reference_logprobs: float [N, T], log-probabilities of the sampled tokens under the reference policy as it was
            when the rollout was drawn; those of π_old where that is the reference (`training.reference: rollout`).
        greedy_rewards: float [N], reward of the greedy completion of the same prompt (advantage `greedy_baseline`),
            else None.
        values: float [N, T], the critic's value before each own token as the rollout was drawn; None without a critic.
        old_logprobs: float [N, T], log π_old of the sampled tokens as the trainer computes it, where `training.sampler`
            draws them from another μ (whose log-probabilities `rollout` holds) or the cell wants it
            (`training.old_logprobs`), else None.
        sampling_stats: with dynamic sampling, what was drawn to find these groups, else None.
        timeouts: float [N], how many limits of time decided each reward (those of a prompt's greedy completion stand
            with its first trajectory); None where the task has no rewards with such limits.
        reward_terms: float [N, K], the terms of the reward without their weights, NaN where one has no value; None
            where the objective does not read them or the reward has none.
    """

    number: int
    rollout: Rollout
    rewards: Tensor
    correct: Tensor
    reference_logprobs: Tensor
    greedy_rewards: Tensor | None = None
    values: Tensor | None = None
    old_logprobs: Tensor | None = None
    sampling_stats: SamplingStats | None = None
    timeouts: Tensor | None = None
    reward_terms: Tensor | None = None

    def select(self, rows: Tensor, rollout: Rollout) -> Experience:
        """What belongs to some trajectories, given their part of the rollout."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {name: value[rows] for name, value in columns.items() if isinstance(value, Tensor)}
        return replace(self, rollout=rollout, **chosen)


def old_policy(rollout: Rollout, old_logprobs: Tensor | None, sampler: Sampler | None) -> Tensor:
    """log π_old [N, T] of importance ratios: as the sampler recorded it, or the trainer's own where that was computed,
    unless the ratio is to the sampler.

    Args:
        rollout, old_logprobs: see `Experience`.
        sampler: the cell's `training.sampler`.
    """
    if old_logprobs is None or (sampler is not None and sampler.correction == "ratio"):
        return rollout.logp
    return old_logprobs
