"""Split a rollout into minibatches of whole groups, one per update."""

from __future__ import annotations

from collections.abc import Sequence

from klab.harness.training.data.dynamic_sampling import group_rows
from klab.harness.training.data.experience import Experience
from klab.harness.training.runtime.rng import permutation


def minibatch_groups(count: int, parts: int, part: int, *purpose: int | str) -> list[int]:
    """The groups of one of `parts` equal minibatches; an epoch's parts cover each of the `count` groups once.

    A rollout that is not split keeps its order; otherwise `purpose` (seed, rollout, epoch) names the random order.
    """
    if parts == 1:
        return list(range(count))
    order = permutation(count, "minibatches", *purpose)
    size = count // parts
    return sorted(order[part * size : (part + 1) * size])


def select_groups(experience: Experience, groups: Sequence[int]) -> Experience:
    """The part of an experience that belongs to some groups."""
    size = experience.rollout.group_size
    if len(groups) == len(experience.rollout.prompts):
        return experience
    rows = group_rows(groups, size).to(experience.rewards.device)
    return experience.select(rows, experience.rollout.select_prompts(groups))
