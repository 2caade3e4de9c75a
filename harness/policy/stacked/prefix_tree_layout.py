"""Prefix trees as layouts of a forward pass: a batch of cells with equal shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from klab.harness.policy.prefix_tree import PrefixTree
from klab.harness.policy.stacked.attention import attention


class PrefixTreeBatch:
    """Prefix trees of A cells with equal shapes as an `AttentionLayout`.

    Attributes:
        tokens: token ids [A, M].
    """

    def __init__(self, trees: Sequence[PrefixTree], device: torch.device, dtype: torch.dtype) -> None:
        first = trees[0]
        M, num_slots = len(first.tokens), first.token_of_slot.numel()
        positions = torch.cat([tree.positions for tree in trees])
        self.position_limit = int(positions.max()) + 1

        def moved(values: Tensor) -> Tensor:
            return values.to(device, non_blocking=True)

        self.tokens = moved(torch.stack([tree.tokens for tree in trees]))
        self.positions = moved(positions)
        self.token_of_slot = moved(_concatenate([tree.token_of_slot.reshape(-1) for tree in trees], M))
        self.slot_of_token = moved(_concatenate([tree.slot_of_token for tree in trees], num_slots))
        self.output_index: Tensor | None = moved(_concatenate([tree.output_index for tree in trees], M))
        self.attn_bias = None
        if first.attn_bias is not None:
            biases = [tree.attn_bias for tree in trees if tree.attn_bias is not None]
            self.attn_bias = moved(torch.cat(biases)).to(dtype)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attention(queries, keys, values, self.attn_bias)


def causal_bias(length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """[1, length, length], 0 on and below the diagonal, −inf above."""
    return torch.full((1, length, length), -torch.inf, device=device, dtype=dtype).triu_(1)


def _concatenate(indices: list[Tensor], size: int) -> Tensor:
    """Indices of each cell, shifted by `size` per cell before it."""
    return torch.cat([index + size * cell for cell, index in enumerate(indices)])
