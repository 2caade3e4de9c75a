"""Prefix trees as layouts of a forward pass: a batch of cells with equal shapes, or one cell of a packed layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from klab.harness.policy.prefix_tree import PrefixTree
from klab.harness.policy.stacked.attention import attention
from klab.harness.policy.stacked.packed_layout import AttentionRows


class PrefixTreeBatch:
    """Prefix trees of A cells with equal shapes as an `AttentionLayout`.

    Attributes:
        tokens: token ids [A, M].
    """

    def __init__(self, trees: Sequence[PrefixTree], device: torch.device, dtype: torch.dtype) -> None:
        first = trees[0]
        M, num_slots = len(first.tokens), first.token_of_slot.numel()
        self.tokens = torch.stack([tree.tokens for tree in trees]).to(device)
        self.positions = torch.cat([tree.positions for tree in trees]).to(device)
        self.position_limit = int(self.positions.max()) + 1
        self.token_of_slot = _concatenate([tree.token_of_slot.reshape(-1) for tree in trees], M).to(device)
        self.slot_of_token = _concatenate([tree.slot_of_token for tree in trees], num_slots).to(device)
        self.output_index: Tensor | None = _concatenate([tree.output_index for tree in trees], M).to(device)
        self.attn_bias = None
        if first.attn_bias is not None:
            biases = [tree.attn_bias for tree in trees if tree.attn_bias is not None]
            self.attn_bias = torch.cat(biases).to(device, dtype)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attention(queries, keys, values, self.attn_bias)


def attention_rows(tree: PrefixTree, dtype: torch.dtype) -> AttentionRows:
    """A prefix tree as one cell of a packed layout."""
    attn_bias = causal_bias(tree.token_of_slot.shape[1]) if tree.attn_bias is None else tree.attn_bias
    slot_of_token = tree.slot_of_token.numpy()
    return AttentionRows(
        tokens=tree.tokens.numpy(),
        positions=tree.positions.numpy().reshape(-1)[slot_of_token],
        token_of_slot=tree.token_of_slot.numpy(),
        slot_of_token=slot_of_token,
        output_index=tree.output_index.numpy(),
        attn_bias=attn_bias.to(dtype),
        one_slot_per_token=tree.attn_bias is not None,
    )


def causal_bias(length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """[1, length, length], 0 on and below the diagonal, −inf above."""
    return torch.full((1, length, length), -torch.inf, device=device, dtype=dtype).triu_(1)


def _concatenate(indices: list[Tensor], size: int) -> Tensor:
    """Indices of each cell, shifted by `size` per cell before it."""
    return torch.cat([index + size * cell for cell, index in enumerate(indices)])
