"""Cutting a rollout into minibatches, one per update, and those into micro-batches that fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from harness.policy.rollout import Rollout
from harness.training.randomness import permutation
from harness.training.rollouts import Experience


def minibatch(count: int, parts: int, part: int, *purpose: int | str) -> list[int]:
    """The groups of one of `parts` equal minibatches; an epoch's parts cover each of the `count` groups once.

    A rollout that is not split keeps its order; otherwise `purpose` (seed, rollout, epoch) names the random order.
    """
    if parts == 1:
        return list(range(count))
    order = permutation(count, "minibatches", *purpose)
    size = count // parts
    return sorted(order[part * size : (part + 1) * size])


def select(experience: Experience, groups: Sequence[int]) -> Experience:
    """The part of an experience that belongs to some groups."""
    size = experience.rollout.group_size
    if len(groups) == len(experience.rollout.prompts):
        return experience
    rows = (torch.tensor(groups)[:, None] * size + torch.arange(size)).flatten().to(experience.rewards.device)
    return replace(
        experience,
        rollout=experience.rollout.rows(groups),
        rewards=experience.rewards[rows],
        correct=experience.correct[rows],
        reference=experience.reference[rows],
        greedy=None if experience.greedy is None else experience.greedy[rows],
    )


def micro_batches(rollout: Rollout, limit: int | None) -> list[tuple[Rollout, slice]]:
    """Pieces of at most `limit` rows, and which rows: whole groups where these fit, else parts of one."""
    rows, size = rollout.tokens.shape[0], rollout.group_size
    if limit is None or limit >= rows:
        return [(rollout, slice(0, rows))]
    step = limit // size * size or limit
    stretch = max(step, size)
    bounds = [
        (first, min(first + step, start + stretch, rows))
        for start in range(0, rows, stretch)
        for first in range(start, min(start + stretch, rows), step)
    ]
    return [(_cut(rollout, first, last), slice(first, last)) for first, last in bounds]


def _cut(rollout: Rollout, first: int, last: int) -> Rollout:
    prompts = rollout.prompts[first // rollout.group_size : -(-last // rollout.group_size)]
    rows = slice(first, last)
    return replace(
        rollout,
        prompts=prompts,
        group_size=(last - first) // len(prompts),
        tokens=rollout.tokens[rows],
        mask=rollout.mask[rows],
        present=rollout.present[rows],
        logp=rollout.logp[rows],
        truncated=rollout.truncated[rows],
        texts=rollout.texts[rows],
    )
