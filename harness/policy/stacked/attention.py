"""Attention, and where tokens stand for it.

A forward pass holds its tokens in one flat axis. For attention they are spread over lanes of equal length: a lane is a
trajectory, a group's prefix tree, or the newest tokens of a cached one.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

MAX_EXPLICIT_KEYS = 96
"""Up to this many keys, two batched products and a softmax are faster on a CPU than the fused kernel (measured)."""


class AttentionLayout(Protocol):
    """Where A cells' M tokens stand: A·L lanes of S slots. Tokens and slots are numbered through all cells.

    Attributes:
        positions: int64 [A·L or 1, S], each slot's position in its sequence, for the rotary embedding.
        limit: one more than the largest position.
        slots: int64 [A·L·S], the token in each slot.
        places: int64 [A·M], a slot in which each token stands.
        kept: int64 [A·K], the tokens that the caller wants states of; None for all.
    """

    positions: Tensor
    limit: int
    slots: Tensor
    places: Tensor
    kept: Tensor | None

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[heads, A·L, S, size] of queries, keys and values -> the same shape as the queries."""
        ...


def attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Scaled dot-product attention with grouped key-value heads.

    Args:
        queries: [heads, L, Q, size].
        keys, values: [kv_heads, L, K, size].
        bias: [L or 1, Q, K], 0 where a query sees a key and −inf where not; None: causal, Q = K.

    Returns:
        [heads, L, Q, size].
    """
    H, L, Q, size = queries.shape
    N, _, K, _ = keys.shape
    if H != N:
        keys, values = (x.repeat_interleave(H // N, 0) for x in (keys, values))
    if bias is None:
        return functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    if K > MAX_EXPLICIT_KEYS or queries.device.type != "cpu":
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    scores = torch.bmm(queries.reshape(H * L, Q, size), keys.reshape(H * L, K, size).transpose(1, 2))
    shares = torch.add(bias, scores.view(H, L, Q, K), alpha=size**-0.5).softmax(-1)
    return torch.bmm(shares.view(H * L, Q, K), values.reshape(H * L, K, size)).view(H, L, Q, size)
