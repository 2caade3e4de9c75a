"""Incremental decoding without a cache, the reference: every sequence is forwarded anew for every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from klab.harness.policy.prefix_tree import build_unshared
from klab.harness.policy.stacked.batched_layers import batched_forward
from klab.harness.policy.stacked.model import StackedModel
from klab.harness.policy.stacked.prefix_tree_layout import PrefixTreeBatch


class UncachedDecoder:
    """An `IncrementalDecoder` that computes cell by cell, with a causal row per trajectory."""

    one_by_one = False

    def __init__(self, model: StackedModel, prompts: Sequence[Sequence[Sequence[int]]], group_size: int) -> None:
        self.model = model
        self.sequences = [[list(prompt) for prompt in listed for _ in range(group_size)] for listed in prompts]

    def start(self, cells: Sequence[int]) -> dict[int, Tensor]:
        return {cell: self._logits(cell) for cell in range(len(self.sequences))}

    def known_states(self, cell: int) -> None:
        return None

    def step(self, last_tokens: Mapping[int, Tensor], unfinished: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        for cell, tokens in last_tokens.items():
            for sequence, token in zip(self.sequences[cell], tokens.tolist(), strict=True):
                sequence.append(token)
        return {cell: self._logits(cell) for cell in last_tokens}

    def _logits(self, cell: int) -> Tensor:
        N = len(self.sequences[cell])
        nothing = torch.zeros((N, 1), dtype=torch.long)
        tree = build_unshared(self.sequences[cell], torch.arange(N), nothing, nothing.view(-1))
        batch = PrefixTreeBatch([tree], self.model.device, self.model.dtype)
        weights = self.model.weights([[cell]])[0]
        return self.model.logits(weights, batched_forward(self.model, weights, batch.tokens, batch))[0]
