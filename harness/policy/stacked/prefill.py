"""The forward pass of the prompts before decoding, which keeps every layer's keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from klab.harness.policy.stacked.attention import attention

KVCache = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [num_kv_heads, rows, slots, head_dim]."""


class Prefill:
    """A causal row per prompt as an `AttentionLayout`; its output tokens are the prompts' last.

    Args:
        prompts: token ids [C][P][length]; a cell may have fewer than the others.
        num_rows: rows per cell, at least P; those without a prompt hold padding.
        width: slots per row, at least the longest prompt.
        attn_bias: [1, width, width], the causal mask spelled out; None: left to the attention kernel.

    Attributes:
        tokens: token ids [C, num_rows · width], padded at the right.
        cache: filled by the forward pass.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        num_rows: int,
        width: int,
        device: torch.device,
        attn_bias: Tensor | None = None,
    ) -> None:
        C = len(prompts)
        padded = np.zeros((C, num_rows, width), dtype=np.int64)
        last = np.zeros((C, num_rows), dtype=np.int64)
        for c, listed in enumerate(prompts):
            for p, prompt in enumerate(listed):
                padded[c, p, : len(prompt)] = prompt
                last[c, p] = len(prompt) - 1
        self.tokens = torch.from_numpy(padded).to(device, non_blocking=True).view(C, -1)
        self.token_of_slot = self.slot_of_token = torch.arange(C * num_rows * width, device=device)
        self.positions = torch.arange(width, device=device)[None]
        self.position_limit = width
        rows = np.arange(C * num_rows)
        output_index = torch.from_numpy(rows * width + last.reshape(-1))
        self.output_index: Tensor | None = output_index.to(device, non_blocking=True)
        self.attn_bias = attn_bias
        self.cache: KVCache = []

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.cache.append((keys, values))
        return attention(queries, keys, values, self.attn_bias)
