"""Cutting trajectories into micro-batches that fit in memory, and that processes can share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klab.grid.schema.sections import TrainingSection
from klab.harness.policy.rollout import Rollout
from klab.harness.training.distributed.process_group import ALONE, World

Piece = tuple[Rollout, slice]
"""A micro-batch, and which rows of the whole it has."""

Turn = tuple[Piece, ...]
"""The micro-batches, one of each cell of a pack, that go through the policies together, and which rows they are."""

SAMPLED = 16
"""Tokens that may be sampled at once for one that may be trained on: they leave keys and values only, where a backward
pass needs every layer's activations."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What may go through a policy at once.

    Attributes:
        rows: trajectories.
        tokens: own ones and the environment's of every trajectory, and the prompt of every group; None: any number.
        parts: in how many parts at least a rollout is sampled.
    """

    rows: int | None = None
    tokens: int | None = None
    parts: int = 1

    @classmethod
    def of(cls, training: TrainingSection) -> Limit:
        """As a cell's settings say."""
        return cls(training.micro_batch, training.token_budget)

    def halved(self, rows: int) -> Limit:
        """Half of this, where a whole is `rows` trajectories."""
        tokens = None if self.tokens is None else max(1, self.tokens // 2)
        return Limit(min(rows, self.rows or rows) // 2, tokens, 2 * self.parts)

    def draws(self, lengths: Sequence[int], group_size: int, max_new_tokens: int) -> list[slice]:
        """Which prompts of these lengths to sample together: as many as fit if every completion is as long as it may
        be, in about equal parts."""
        count = -(-len(lengths) // self.parts)
        if self.tokens is not None:
            group = group_size * (max(lengths) + max_new_tokens)
            count = min(count, max(1, SAMPLED * self.tokens // group))
        count = -(-len(lengths) // -(-len(lengths) // count))
        return [slice(start, min(start + count, len(lengths))) for start in range(0, len(lengths), count)]


WHOLE = Limit()


def micro_batches(rollout: Rollout, limit: Limit) -> list[Piece]:
    """Pieces within the limit, and which rows: whole groups where these fit, else parts of one, a row at the least."""
    rows, size = rollout.tokens.shape[0], rollout.group_size
    most, budget = limit.rows or rows, limit.tokens or math.inf
    if rows <= most and limit.tokens is None:
        return [(rollout, slice(0, rows))]
    own = rollout.present.sum(1).tolist()
    bounds: list[tuple[int, int]] = []
    first, spent = 0, 0  # of the piece that is being filled with whole groups
    for group, prompt in enumerate(rollout.prompts):
        start, end = group * size, (group + 1) * size
        cost = len(prompt) + sum(own[start:end])
        if start > first and (end - first > most or spent + cost > budget):
            bounds.append((first, start))
            first, spent = start, 0
        spent += cost
        if end - first > most or spent > budget:
            bounds += _parts(len(prompt), own, start, end, most, budget)
            first, spent = end, 0
    if first < rows:
        bounds.append((first, rows))
    if len(bounds) == 1:
        return [(rollout, slice(0, rows))]
    return [(_cut(rollout, first, last), slice(first, last)) for first, last in bounds]


def _parts(prompt: int, own: Sequence[int], start: int, end: int, most: int, budget: float) -> list[tuple[int, int]]:
    """The rows of one group that is too large; `prompt`: the tokens of its prompt."""
    bounds, first, spent = [], start, prompt
    for row in range(start, end):
        if row > first and (row - first >= most or spent + own[row] > budget):
            bounds.append((first, row))
            first, spent = row, prompt
        spent += own[row]
    return [*bounds, (first, end)]


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


def turns(rollouts: Sequence[Rollout], limit: Limit, world: World = ALONE) -> list[Turn]:
    """The turns of a pack in pieces within the limit; where a cell's rows suffice, one for each process."""
    return in_turns([micro_batches(rollout, _least(limit, rollout, world)) for rollout in rollouts])


def by_turns(
    rollouts: Sequence[Rollout],
    limit: Limit,
    work: Callable[[list[Rollout]], list[Tensor]],
    world: World = ALONE,
) -> list[Tensor]:
    """Per cell, what `work` says about its rows, within the limit at a time and shared among the processes."""
    every = turns(rollouts, limit, world)
    found = {place: work([piece for piece, _ in every[place]]) for place in world.turns(len(every))}
    passes: dict[int, list[Tensor]] = {}
    for part in world.exchange("rows", lambda: found, rollouts[0].tokens.device):
        passes |= part
    return [
        torch.cat([passes[place][c] for place, turn in enumerate(every) if not empty(turn[c])])
        for c in range(len(rollouts))
    ]


def _least(limit: Limit, rollout: Rollout, world: World) -> Limit:
    if world.size == 1:
        return limit
    groups, size = len(rollout.prompts), rollout.group_size
    part = -(-groups // world.size) * size if groups >= world.size else -(-groups * size // world.size)
    return replace(limit, rows=min(limit.rows or part, part))
