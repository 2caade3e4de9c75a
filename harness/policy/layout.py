"""Where tokens of cells of unequal sizes stand: in one flat axis, and in lanes of slots for each cell's attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Lanes:
    """Where one cell's M tokens stand for attention: L lanes of S slots.

    Attributes:
        tokens: ids [M].
        positions: [M], in their sequences.
        slots: [L, S], the token in each slot.
        places: [M], a slot (flat) in which each token stands.
        kept: [K], the tokens whose final states are wanted; None: all.
        bias: [L or 1, S, slots seen], 0 where a slot sees another and −inf where not; slots of earlier passes first.
        unique: every token is seen in one slot only.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    places: Tensor
    kept: Tensor | None
    bias: Tensor
    unique: bool


class Layout:
    """The lanes of some cells with M tokens and S slots altogether, and the gathers between the two.

    The slots of a cell are ordered (query, key or value; head; lane; slot), one cell after the other.

    Attributes:
        cells: which cells of the policy's stack they are.
        sizes, slots: tokens and slots of each cell.
        tokens, positions: [M].
        limit: one more than the largest position.
        spread: [3 · heads · S], the row of `qkv.view(-1, head_size)` in each slot.
        collect: [M · heads], the slot in which each head of each token finds its mixed values.
        owned: [M · 3 · heads], the slot that each row of qkv stands in, one past the last where nothing sees it: the
            inverse of `spread`, if it has one.
        kept: [K], the tokens whose states are wanted, with `kept_sizes` of each cell, and `collect_kept`.
    """

    def __init__(self, cells: Sequence[int], lanes: Sequence[Lanes], heads: int) -> None:
        self.cells, self.lanes, self.heads = list(cells), list(lanes), heads
        self.sizes = [len(each.tokens) for each in lanes]
        self.slots = [each.slots.numel() for each in lanes]
        self.tokens = torch.cat([each.tokens for each in lanes])
        self.positions = torch.cat([each.positions for each in lanes])
        self.limit = int(self.positions.max()) + 1
        head = torch.arange(3 * heads)
        spread, collect, owned = [], [], []
        token = slot = 0
        for each, size, count in zip(lanes, self.sizes, self.slots, strict=True):
            flat, places = each.slots.reshape(-1), each.places[:, None]
            spread.append(((flat + token) * (3 * heads) + head[:, None]).view(-1))
            collect.append((places + (head[:heads] * count + slot * heads)).view(-1))
            if each.unique:
                stands = (flat[each.places] == torch.arange(size))[:, None]  # padding stands nowhere
                nowhere = 3 * heads * sum(self.slots)
                owned.append(torch.where(stands, places + (head * count + slot * 3 * heads), nowhere).view(-1))
            token, slot = token + size, slot + count
        self.spread, self.collect = torch.cat(spread), torch.cat(collect)
        self.owned = torch.cat(owned) if len(owned) == len(self.lanes) else None
        self.kept: Tensor | None = None
        self.kept_sizes, self.collect_kept = self.sizes, self.collect
        kept = [each.kept for each in lanes if each.kept is not None]
        if kept:
            starts = [sum(self.sizes[:i]) for i in range(len(kept))]
            self.kept = torch.cat([rows + start for rows, start in zip(kept, starts, strict=True)])
            self.kept_sizes = [len(rows) for rows in kept]
            self.collect_kept = self.collect.view(-1, heads).index_select(0, self.kept).view(-1)

    def rows(self, vocabulary: int) -> Tensor:
        """[M], the tokens' rows in the embeddings of the stack, one cell's after the other's."""
        offsets = torch.tensor(self.cells).mul_(vocabulary)
        return self.tokens + offsets.repeat_interleave(torch.tensor(self.sizes))
