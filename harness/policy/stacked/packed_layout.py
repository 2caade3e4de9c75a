"""Where tokens of cells of unequal sizes stand: in one flat axis, and in lanes of slots for attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from klab.harness.policy.stacked.attention import MAX_EXPLICIT_KEYS
from klab.harness.policy.stacked.grouped_ops import Segments

Indices = NDArray[np.int64]

ALIGNMENT = 64
"""Bytes. Where a cell's matrices begin at multiples of it, as memory that is allocated alone does, the bits of its
products are those that it has alone."""


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Where one cell's M new tokens stand for attention: L lanes of S slots, which see K slots.

    Attributes:
        tokens: ids [M].
        positions: [M], in their sequences.
        slots: [L, S], the token in each slot.
        places: [M], a slot (flat) in which each token stands.
        kept: [J], the tokens whose final states are wanted; None: all.
        bias: [L or 1, S, K], 0 where a slot sees another and −inf where not.
        seen: [L, K], the row of all tokens so far (`Layout.start`) in each slot that is seen; None: the slots, K = S.
        unique: every token is seen in one slot only.
    """

    tokens: Indices
    positions: Indices
    slots: Indices
    places: Indices
    kept: Indices | None
    bias: Tensor
    seen: Indices | None = None
    unique: bool = True


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Cells with lanes of one shape, whose attention is computed together; they follow one another.

    Attributes:
        members: their positions among the layout's cells.
        shape: (cells, heads, L, S, K).
        bias: [cells, 1, L or 1, S, K].
        slots: its queries', keys' and values' stretch of `Layout.spread`.
        mixed: its stretch of the mixed values.
    """

    members: list[int]
    shape: tuple[int, int, int, int, int]
    bias: Tensor
    slots: slice
    mixed: slice

    @property
    def matrices(self) -> int:
        cells, heads, lanes, _, _ = self.shape
        return cells * heads * lanes

    @property
    def firsts(self) -> list[tuple[int, int]]:
        """Each member, and where its queries begin among those of the run."""
        _, heads, L, S, _ = self.shape
        return [(member, number * heads * L * S) for number, member in enumerate(self.members)]

    def views(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [matrices, S, size], keys and values [matrices, K, size] of all slots [Σ, size]."""
        own, size, (_, _, _, S, K) = slots[self.slots], slots.shape[1], self.shape
        queries = self.matrices * S
        keys, values = own[queries:].view(2, self.matrices, K, size).unbind(0)
        return own[:queries].view(self.matrices, S, size), keys, values


class PackedLayout:
    """The lanes of some cells with M tokens altogether, and the gathers between tokens and slots.

    Attributes:
        cells: which cells of the policy's stack they are, ascending.
        stretches: of all C cells of the stack.
        tokens, positions: [M].
        limit: one more than the largest position.
        start: the row of the first new token among all tokens so far.
        runs: cells whose attention is computed together. A run's slots are its queries, keys and values, each ordered
            (cell; head; lane; slot).
        spread: for each slot, its row of all tokens' `qkv.view(-1, head_size)`.
        collect: [M · heads], where each head of each token finds its mixed values: ordered (run; cell; head; lane;
            slot).
        kept: [J], the tokens whose states are wanted, with `kept_stretches`, `kept_sizes` of `cells`, `collect_kept`.
    """

    def __init__(
        self, cells: Sequence[int], lanes: Sequence[AttentionRows], heads: int, total: int, start: int = 0
    ) -> None:
        self.cells, self.lanes, self.num_heads, self.start = list(cells), list(lanes), heads, start
        sizes = [len(each.tokens) for each in lanes]
        self.stretches = self._stretches(sizes, total)
        self._firsts = np.cumsum([0, *sizes])
        self.tokens = torch.from_numpy(np.concatenate([each.tokens for each in lanes]))
        positions = np.concatenate([each.positions for each in lanes])
        self.positions, self.limit = torch.from_numpy(positions), int(positions.max()) + 1
        self.runs: list[AttentionBatch] = []
        spread: list[Indices] = []
        slots = mixed = 0
        for members in self._members():
            index, run = self._run(members, slots, mixed)
            spread += index
            slots, mixed = run.slots.stop, run.mixed.stop
            self.runs.append(run)
        self.spread, self.mixed = torch.from_numpy(np.concatenate(spread)), mixed
        head = np.arange(heads)
        collect = {}
        for run in self.runs:
            for i, first in run.firsts:
                collect[i] = lanes[i].places[:, None] + (head * lanes[i].slots.size + run.mixed.start + first)
        every = np.concatenate([collect[i] for i in range(len(lanes))])
        self.collect = torch.from_numpy(every.reshape(-1))
        self.kept: Tensor | None = None
        self.kept_sizes, self.kept_stretches, self.collect_kept = sizes, self.stretches, self.collect
        kept = [each.kept + first for each, first in zip(lanes, self._firsts, strict=False) if each.kept is not None]
        if kept:
            chosen = np.concatenate(kept)
            self.kept = torch.from_numpy(chosen)
            self.kept_sizes = [len(rows) for rows in kept]
            self.kept_stretches = self._stretches(self.kept_sizes, total)
            self.collect_kept = torch.from_numpy(every[chosen].reshape(-1))

    def _stretches(self, sizes: Sequence[int], total: int) -> Segments:
        own = dict(zip(self.cells, sizes, strict=True))
        return Segments([own.get(cell, 0) for cell in range(total)])

    def _members(self) -> list[list[int]]:
        """Positions of cells whose attention may be computed together without a change of bits."""

        def shape(position: int) -> tuple[int, ...]:
            each = self.lanes[position]
            S, K = each.bias.shape[1:]
            width = each.bias.element_size() * self.num_heads * len(each.slots) * S * K
            apart = K > MAX_EXPLICIT_KEYS or width % ALIGNMENT > 0
            return (*each.slots.shape, *each.bias.shape, position if apart else -1)

        order = sorted(range(len(self.lanes)), key=shape)
        return [list(alike) for _, alike in groupby(order, shape)]

    def _run(self, members: list[int], slots: int, mixed: int) -> tuple[list[Indices], AttentionBatch]:
        chosen, heads, n = [self.lanes[i] for i in members], self.num_heads, len(members)
        L, S = chosen[0].slots.shape
        K = chosen[0].bias.shape[2]
        head = np.arange(heads)[:, None, None]
        queries = np.stack([each.slots + first for each, first in zip(chosen, self._firsts[members], strict=True)])
        queries += self.start
        seen = queries if chosen[0].seen is None else np.stack([each.seen for each in chosen if each.seen is not None])
        rows = seen[:, None] * (3 * heads) + head
        index = [(queries[:, None] * (3 * heads) + head), rows + heads, rows + 2 * heads]
        run = AttentionBatch(
            members,
            (n, heads, L, S, K),
            torch.stack([each.bias for each in chosen]).unsqueeze(1),
            slice(slots, slots + n * heads * L * (S + 2 * K)),
            slice(mixed, mixed + n * heads * L * S),
        )
        return [part.reshape(-1) for part in index], run

    @cached_property
    def owned(self) -> Tensor | None:
        """[M · 3 · heads], the slot that each row of qkv stands in, one past the last where nothing sees it: the
        inverse of `spread`. None where a token is seen in several slots."""
        if not all(each.unique for each in self.lanes):
            return None
        found = {}
        head = np.arange(3 * self.num_heads)
        for run in self.runs:
            _, heads, L, S, _ = run.shape
            parts = head // heads * (run.mixed.stop - run.mixed.start) + head % heads * L * S + run.slots.start
            for i, first in run.firsts:
                each = self.lanes[i]
                stands = each.slots.reshape(-1)[each.places] == np.arange(len(each.places))  # padding stands nowhere
                slots = each.places[:, None] + (parts + first)
                found[i] = np.where(stands[:, None], slots, len(self.spread)).reshape(-1)
        return torch.from_numpy(np.concatenate([found[i] for i in range(len(self.lanes))]))

    def embedded(self, table: Tensor) -> Tensor:
        """[M, hidden], the tokens' rows of their cells' embeddings [C, V, hidden]."""
        if table.stride(0) == 0:
            return functional.embedding(self.tokens, table[0])
        return functional.embedding(self.tokens + self.stretches.owner * table.shape[1], table.flatten(0, 1))
