"""Layout of a packed forward pass: all cells' tokens in one flat axis, and the indices between tokens and attention.

Cells may have any number of tokens. For attention, each cell's tokens are placed in rows of slots (`AttentionRows`),
and the attention of cells whose rows have equal shapes is one batched call (`AttentionBatch`).
"""

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
"""Bytes. A matrix that begins at a multiple of this, as memory allocated for it alone does, gives products with the
same bits as that one."""


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """One cell's M new tokens in L rows of S query slots, which attend to K key slots.

    Attributes:
        tokens: token ids [M].
        positions: [M], position of each token in its sequence.
        token_of_slot: [L, S], the token in each slot; padding repeats some token.
        slot_of_token: [M], a slot (flat index into [L, S]) that holds the token.
        output_index: [J], tokens whose final hidden states are returned; None: all.
        attn_bias: [L or 1, S, K], 0 where a slot attends to a key and −inf where not.
        key_index: [L, K], for each key slot the index of its token among all tokens so far (see
            `PackedLayout.start`); None: the keys are the query slots themselves, K = S.
        one_slot_per_token: no token stands in two slots.
    """

    tokens: Indices
    positions: Indices
    token_of_slot: Indices
    slot_of_token: Indices
    output_index: Indices | None
    attn_bias: Tensor
    key_index: Indices | None = None
    one_slot_per_token: bool = True


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Cells whose rows have one shape and whose attention is one batched call.

    Attributes:
        members: their indices among the layout's cells.
        shape: (cells, heads, L, S, K).
        attn_bias: [cells, 1, L or 1, S, K].
        qkv_slice: rows of the gathered queries, keys and values (`PackedLayout.qkv_index`) that are this batch's.
        output_slice: rows of the attention output that are this batch's.
    """

    members: list[int]
    shape: tuple[int, int, int, int, int]
    attn_bias: Tensor
    qkv_slice: slice
    output_slice: slice

    @property
    def num_matrices(self) -> int:
        """Attention matrices: cells × heads × rows."""
        cells, heads, L, _, _ = self.shape
        return cells * heads * L

    @property
    def member_offsets(self) -> list[tuple[int, int]]:
        """Each member, and where its queries begin among those of the batch."""
        _, heads, L, S, _ = self.shape
        return [(member, number * heads * L * S) for number, member in enumerate(self.members)]

    def split_qkv(self, gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of all gathered rows [Σ, head_dim]: queries [num_matrices, S, head_dim], keys and values
        [num_matrices, K, head_dim]."""
        own, head_dim, (_, _, _, S, K) = gathered[self.qkv_slice], gathered.shape[1], self.shape
        queries = self.num_matrices * S
        keys, values = own[queries:].view(2, self.num_matrices, K, head_dim).unbind(0)
        return own[:queries].view(self.num_matrices, S, head_dim), keys, values


class PackedLayout:
    """The tokens of some cells of a stack, M altogether, with the indices that attention needs.

    Args:
        cells: cells of the stack, ascending.
        rows: one per cell.
        num_heads: attention heads, as many as key-value heads.
        total: C, cells of the stack.
        start: index of the first new token among all tokens so far, when decoding with a cache.

    Attributes:
        segments: of all C cells; those that take no part have length 0.
        tokens, positions: int64 [M].
        position_limit: one more than the largest position.
        batches: cells whose attention is computed together. The gathered rows of a batch are its queries, then keys,
            then values, each ordered by cell, head, row, slot.
        qkv_index: int64, for each gathered row the row of all tokens' `qkv.view(-1, head_dim)` that it copies.
        attn_rows: number of rows of the attention output, ordered by batch, cell, head, row, slot.
        attn_index: int64 [M · num_heads], the attention output row of each head of each token.
        output_index: int64 [J], tokens whose final hidden states are returned; None: all.
        output_sizes, output_segments, output_attn_index: the sizes by cell, the segments, and `attn_index` of those.
    """

    def __init__(
        self, cells: Sequence[int], rows: Sequence[AttentionRows], num_heads: int, total: int, start: int = 0
    ) -> None:
        self.cells, self.rows, self.num_heads, self.start = list(cells), list(rows), num_heads, start
        sizes = [len(each.tokens) for each in rows]
        self.segments = self._segments(sizes, total)
        self._offsets = np.cumsum([0, *sizes])
        self.tokens = torch.from_numpy(np.concatenate([each.tokens for each in rows]))
        positions = np.concatenate([each.positions for each in rows])
        self.positions, self.position_limit = torch.from_numpy(positions), int(positions.max()) + 1
        self.batches: list[AttentionBatch] = []
        qkv_index: list[Indices] = []
        qkv_rows = attn_rows = 0
        for members in self._batch_members():
            index, batch = self._batch(members, qkv_rows, attn_rows)
            qkv_index += index
            qkv_rows, attn_rows = batch.qkv_slice.stop, batch.output_slice.stop
            self.batches.append(batch)
        self.qkv_index, self.attn_rows = torch.from_numpy(np.concatenate(qkv_index)), attn_rows
        head = np.arange(num_heads)
        found = {}
        for batch in self.batches:
            for i, first in batch.member_offsets:
                stride = rows[i].token_of_slot.size
                found[i] = rows[i].slot_of_token[:, None] + (head * stride + batch.output_slice.start + first)
        attn_index = np.concatenate([found[i] for i in range(len(rows))])
        self.attn_index = torch.from_numpy(attn_index.reshape(-1))
        self.output_index: Tensor | None = None
        self.output_sizes, self.output_segments, self.output_attn_index = sizes, self.segments, self.attn_index
        outputs = [
            each.output_index + first
            for each, first in zip(rows, self._offsets, strict=False)
            if each.output_index is not None
        ]
        if outputs:
            chosen = np.concatenate(outputs)
            self.output_index = torch.from_numpy(chosen)
            self.output_sizes = [len(index) for index in outputs]
            self.output_segments = self._segments(self.output_sizes, total)
            self.output_attn_index = torch.from_numpy(attn_index[chosen].reshape(-1))

    def _segments(self, sizes: Sequence[int], total: int) -> Segments:
        by_cell = dict(zip(self.cells, sizes, strict=True))
        return Segments([by_cell.get(cell, 0) for cell in range(total)])

    def _batch_members(self) -> list[list[int]]:
        """Indices of cells whose attention may be computed together without changing a bit of either's result."""

        def shape(index: int) -> tuple[int, ...]:
            each = self.rows[index]
            S, K = each.attn_bias.shape[1:]
            matrices = each.attn_bias.element_size() * self.num_heads * len(each.token_of_slot) * S * K
            apart = K > MAX_EXPLICIT_KEYS or matrices % ALIGNMENT > 0
            return (*each.token_of_slot.shape, *each.attn_bias.shape, index if apart else -1)

        order = sorted(range(len(self.rows)), key=shape)
        return [list(alike) for _, alike in groupby(order, shape)]

    def _batch(self, members: list[int], qkv_rows: int, attn_rows: int) -> tuple[list[Indices], AttentionBatch]:
        """A batch with its part of `qkv_index`, whose rows follow the `qkv_rows` and `attn_rows` of those before it."""
        chosen, heads, n = [self.rows[i] for i in members], self.num_heads, len(members)
        L, S = chosen[0].token_of_slot.shape
        K = chosen[0].attn_bias.shape[2]
        head = np.arange(heads)[:, None, None]
        queries = np.stack(
            [each.token_of_slot + first for each, first in zip(chosen, self._offsets[members], strict=True)]
        )
        queries += self.start
        keys = queries
        if chosen[0].key_index is not None:
            keys = np.stack([each.key_index for each in chosen if each.key_index is not None])
        rows = keys[:, None] * (3 * heads) + head
        index = [(queries[:, None] * (3 * heads) + head), rows + heads, rows + 2 * heads]
        batch = AttentionBatch(
            members=members,
            shape=(n, heads, L, S, K),
            attn_bias=torch.stack([each.attn_bias for each in chosen]).unsqueeze(1),
            qkv_slice=slice(qkv_rows, qkv_rows + n * heads * L * (S + 2 * K)),
            output_slice=slice(attn_rows, attn_rows + n * heads * L * S),
        )
        return [part.reshape(-1) for part in index], batch

    @cached_property
    def qkv_inverse_index(self) -> Tensor | None:
        """int64 [M · 3 · num_heads], the gathered row that copies each row of qkv, or one past the last where none
        does: the inverse of `qkv_index`. None where a token stands in several slots."""
        if not all(each.one_slot_per_token for each in self.rows):
            return None
        found = {}
        head = np.arange(3 * self.num_heads)
        for batch in self.batches:
            _, heads, L, S, _ = batch.shape
            queries = batch.output_slice.stop - batch.output_slice.start
            parts = head // heads * queries + head % heads * L * S + batch.qkv_slice.start
            for i, first in batch.member_offsets:
                each = self.rows[i]
                # padding tokens name a slot that holds another token
                in_slot = each.token_of_slot.reshape(-1)[each.slot_of_token] == np.arange(len(each.slot_of_token))
                rows = each.slot_of_token[:, None] + (parts + first)
                found[i] = np.where(in_slot[:, None], rows, len(self.qkv_index)).reshape(-1)
        return torch.from_numpy(np.concatenate([found[i] for i in range(len(self.rows))]))

    def embed(self, table: Tensor) -> Tensor:
        """[M, hidden_size], the tokens' rows of their cells' embeddings [C, vocab_size, hidden_size]."""
        if table.stride(0) == 0:
            return functional.embedding(self.tokens, table[0])
        return functional.embedding(self.tokens + self.segments.ids * table.shape[1], table.flatten(0, 1))
