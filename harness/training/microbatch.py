"""Cutting trajectories into micro-batches that fit in memory, and that processes can share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from harness.policy.rollout import Rollout
from harness.training.world import ALONE, World

Piece = tuple[Rollout, slice]
"""A micro-batch, and which rows of the whole it has."""

Turn = tuple[Piece, ...]
"""The micro-batches, one of each cell of a pack, that go through the policies together, and which rows they are."""


def micro_batches(rollout: Rollout, limit: int | None) -> list[Piece]:
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


def in_turns(pieces: Sequence[Sequence[Piece]]) -> list[Turn]:
    """The pieces [cell][micro-batch] as turns [micro-batch][cell].

    A cell that has no more of them repeats its first with no rows: it takes part in the forward pass alone, so that
    packs stay together.
    """
    most = max(len(listed) for listed in pieces)
    padded = [[*listed, *[(listed[0][0], slice(0, 0))] * (most - len(listed))] for listed in pieces]
    return list(zip(*padded, strict=True))


def empty(piece: Piece) -> bool:
    """Whether a piece stands for none of the cell's rows."""
    return bool(piece[1].start == piece[1].stop)


def turns(rollouts: Sequence[Rollout], limit: int | None, world: World = ALONE) -> list[Turn]:
    """The turns of a pack in pieces of at most `limit` rows; where a cell's rows suffice, one for each process."""
    return in_turns([micro_batches(rollout, _least(limit, rollout, world)) for rollout in rollouts])


def by_turns(
    rollouts: Sequence[Rollout],
    limit: int | None,
    work: Callable[[list[Rollout]], list[Tensor]],
    world: World = ALONE,
) -> list[Tensor]:
    """Per cell, what `work` says about its rows, at most `limit` of them at a time and shared among the processes."""
    every = turns(rollouts, limit, world)
    found = {place: work([piece for piece, _ in every[place]]) for place in world.turns(len(every))}
    passes: dict[int, list[Tensor]] = {}
    for part in world.exchange("rows", lambda: found, rollouts[0].tokens.device):
        passes |= part
    return [
        torch.cat([passes[place][c] for place, turn in enumerate(every) if not empty(turn[c])])
        for c in range(len(rollouts))
    ]


def _least(limit: int | None, rollout: Rollout, world: World) -> int | None:
    if world.size == 1:
        return limit
    groups, size = len(rollout.prompts), rollout.group_size
    part = -(-groups // world.size) * size if groups >= world.size else -(-groups * size // world.size)
    return min(limit or part, part)
