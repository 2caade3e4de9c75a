"""Attention, and the arrangements that decide which token sees which.

A forward pass holds its tokens in one flat axis. For attention they are spread over lanes of equal length, `[lanes, slots]`:
a lane is a trajectory, a group's prefix tree, or a group's cached sequence during decoding.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EXPLICIT_SLOTS = 96
"""Up to this many keys two batched products and a softmax are faster on a CPU than the fused kernel (measured)."""


class Arrangement(Protocol):
    """Where tokens stand for attention.

    Attributes:
        positions: int64 [lanes or 1, slots], the position of every slot in its sequence, for the rotary embedding.
        limit: one more than the largest position.
    """

    positions: Tensor
    limit: int

    def spread(self, flat: Tensor) -> Tensor:
        """[A, M, width] -> [lanes, slots, width]."""
        ...

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[lanes, heads, slots, size] of queries, keys and values -> the same shape as the queries."""
        ...

    def collect(self, mixed: Tensor, cells: int, last: bool) -> Tensor:
        """[lanes, slots, width] -> [A, M, width], or [A, K, width] of the kept tokens in the last layer."""
        ...

    def kept(self, flat: Tensor) -> Tensor:
        """[A, M, width] -> [A, K, width]."""
        ...


def attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Scaled dot-product attention with grouped key-value heads.

    Args:
        queries: [L, heads, Q, size].
        keys, values: [L, kv_heads, K, size].
        bias: [L or 1, Q, K], 0 where a query sees a key and −inf where not; None: causal, Q = K.

    Returns:
        [L, heads, Q, size].
    """
    L, H, Q, size = queries.shape
    N, K = keys.shape[1:3]
    if bias is not None and K <= EXPLICIT_SLOTS and queries.device.type == "cpu":
        scores = torch.bmm(
            queries.reshape(L * N, (H // N) * Q, size), keys.reshape(L * N, K, size).transpose(1, 2)
        ).view(L, H, Q, K)
        shares = torch.add(bias.unsqueeze(1), scores, alpha=size**-0.5).softmax(-1)
        mixed = torch.bmm(shares.view(L * N, (H // N) * Q, K), values.reshape(L * N, K, size))
        return mixed.view(L, H, Q, size)
    if H != N:
        keys, values = (x.repeat_interleave(H // N, 1) for x in (keys, values))
    if bias is None:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias.unsqueeze(1))
