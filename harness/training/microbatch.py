"""Cutting trajectories into micro-batches that fit in memory."""

from __future__ import annotations

from dataclasses import replace

from harness.policy.rollout import Rollout


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
