"""Dynamic sampling (DAPO, Yu et al. 2025): resample until enough groups have rewards that are not all equal.

Rewards are the task's, before any charge for length. A reward that is NaN equals nothing: its group is kept, and the
update that it spoils is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klab.harness.policy.rollout import Rollout
from klab.tasks.task import Example


@dataclass(frozen=True, slots=True)
class SampledGroups:
    """P groups of one cell that were sampled together; N = P × group_size.

    Attributes:
        examples: P, what each group answers.
        rollout: their trajectories.
        rewards, correct: float [N].
        timeouts: float [N], how many limits of time decided each reward; None where the task has no such limits.
        reward_terms: float [N, K], the terms of the reward, NaN where one has no value; None where nobody reads them.
    """

    examples: list[Example]
    rollout: Rollout
    rewards: Tensor
    correct: Tensor
    timeouts: Tensor | None = None
    reward_terms: Tensor | None = None

    def groups(self, chosen: Sequence[int]) -> SampledGroups:
        """Some of the groups, in this order."""
        rows = group_rows(chosen, self.rollout.group_size).to(self.rewards.device)
        return SampledGroups(
            [self.examples[g] for g in chosen],
            self.rollout.select_prompts(chosen),
            self.rewards[rows],
            self.correct[rows],
            None if self.timeouts is None else self.timeouts[rows],
            None if self.reward_terms is None else self.reward_terms[rows],
        )

    @classmethod
    def joined(cls, parts: Sequence[SampledGroups]) -> SampledGroups:
        """The groups of several draws one after the other."""

        def all_of(columns: Sequence[Tensor | None]) -> Tensor | None:
            known = [column for column in columns if column is not None]
            return torch.cat(known) if len(known) == len(parts) else None

        return cls(
            [example for part in parts for example in part.examples],
            Rollout.concatenate([part.rollout for part in parts]),
            torch.cat([part.rewards for part in parts]),
            torch.cat([part.correct for part in parts]),
            all_of([part.timeouts for part in parts]),
            all_of([part.reward_terms for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class SamplingStats:
    """What dynamic sampling sampled for a rollout, used or not.

    Attributes:
        groups, tokens: how many; tokens are the policy's own.
        unused: the tokens of the groups that the rollout does not have.
        reward_mean, reward_std, correct: of the first round, whose prompts were not selected by their rewards: the
            groups that are used do not tell how good the policy is.
    """

    groups: int
    tokens: int
    unused: int
    reward_mean: float
    reward_std: float
    correct: float

    @classmethod
    def of(cls, draws: Sequence[SampledGroups], used: SampledGroups) -> SamplingStats:
        rewards = draws[0].rewards.double()
        tokens = sum(int(draw.rollout.mask.sum()) for draw in draws)
        return cls(
            groups=sum(len(draw.examples) for draw in draws),
            tokens=tokens,
            unused=tokens - int(used.rollout.mask.sum()),
            reward_mean=float(rewards.mean()),
            reward_std=float(rewards.std(correction=0)),
            correct=float(draws[0].correct.mean()),
        )


def nonzero_variance_groups(rewards: Tensor, group_size: int) -> list[int]:
    """The groups of rewards [N] in which not all are equal."""
    by_group = rewards.view(-1, group_size)
    return (by_group != by_group[:, :1]).any(1).nonzero().flatten().tolist()


def shortfall(draws: Sequence[SampledGroups], count: int) -> int:
    """How many of `count` groups with unequal rewards are still missing."""
    found = sum(len(nonzero_variance_groups(draw.rewards, draw.rollout.group_size)) for draw in draws)
    return max(0, count - found)


def fill(draws: Sequence[SampledGroups], count: int) -> SampledGroups:
    """Choose `count` groups: those with unequal rewards in the order sampled, then the equal ones of the first round.

    Args:
        count: at most the groups of the first draw.
    """
    parts, left = [], count
    for draw in draws:
        chosen = nonzero_variance_groups(draw.rewards, draw.rollout.group_size)[:left]
        if chosen:
            parts.append(draw.groups(chosen))
            left -= len(chosen)
    if left:
        first = draws[0]
        used = set(nonzero_variance_groups(first.rewards, first.rollout.group_size))
        parts.append(first.groups([g for g in range(len(first.examples)) if g not in used][:left]))
    return SampledGroups.joined(parts)


def group_rows(groups: Sequence[int], size: int) -> Tensor:
    """The rows [len(groups) · size] of whole groups."""
    return (torch.tensor(groups, dtype=torch.long)[:, None] * size + torch.arange(size)).flatten()
