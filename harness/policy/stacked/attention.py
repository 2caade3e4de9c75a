"""Attention over padded rows of slots, and the interface of whatever places tokens in them.

A forward pass holds the tokens of all cells in one flat axis without padding. Attention alone needs sequences, so for
attention tokens are copied into *slots*: rows of equal length, one row per trajectory, per group of trajectories that
share a prompt, or per group's newest tokens in incremental decoding.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

MAX_EXPLICIT_KEYS = 96
"""Up to this many keys, two batched products and a softmax are faster on a CPU than the fused kernel (measured)."""


class AttentionLayout(Protocol):
    """Placement of A cells' M tokens each in A·L rows of S slots. Tokens and slots are numbered through all cells.

    Attributes:
        positions: int64 [A·L or 1, S], position of each slot in its sequence, for the rotary embedding.
        position_limit: one more than the largest position.
        token_of_slot: int64 [A·L·S], the token in each slot; padding repeats some token.
        slot_of_token: int64 [A·M], a slot that holds the token.
        output_index: int64 [A·K], tokens whose final hidden states are returned; None for all.
    """

    positions: Tensor
    position_limit: int
    token_of_slot: Tensor
    slot_of_token: Tensor
    output_index: Tensor | None

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of one layer; a cache of keys and values is read and extended here.

        Args:
            queries, keys, values: [heads, A·L, S, head_dim] of the new tokens.

        Returns:
            the same shape as the queries.
        """
        ...


def attention(queries: Tensor, keys: Tensor, values: Tensor, attn_bias: Tensor | None) -> Tensor:
    """Scaled dot-product attention with grouped key-value heads.

    Args:
        queries: [num_heads, rows, Q, head_dim].
        keys, values: [num_kv_heads, rows, K, head_dim].
        attn_bias: [rows or 1, Q, K], 0 where a query attends to a key and −inf where not; None: causal, Q = K.

    Returns:
        [num_heads, rows, Q, head_dim].
    """
    H, rows, Q, head_dim = queries.shape
    num_kv_heads, _, K, _ = keys.shape
    if num_kv_heads != H:
        keys, values = (x.repeat_interleave(H // num_kv_heads, 0) for x in (keys, values))
    if attn_bias is None:
        return functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    if K > MAX_EXPLICIT_KEYS or queries.device.type != "cpu":
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=attn_bias)
    scores = torch.bmm(queries.reshape(H * rows, Q, head_dim), keys.reshape(H * rows, K, head_dim).transpose(1, 2))
    probs = torch.add(attn_bias, scores.view(H, rows, Q, K), alpha=head_dim**-0.5).softmax(-1)
    return torch.bmm(probs.view(H * rows, Q, K), values.reshape(H * rows, K, head_dim)).view(H, rows, Q, head_dim)
