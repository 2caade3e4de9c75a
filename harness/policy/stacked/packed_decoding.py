"""Incremental decoding of models that compute cells of unequal sizes together: all cells in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from klab.harness.policy.prefix_tree import Indices
from klab.harness.policy.stacked.growing_prefix_tree import GrowingPrefixTree
from klab.harness.policy.stacked.model import StackedModel
from klab.harness.policy.stacked.packed_layers import packed_forward
from klab.harness.policy.stacked.packed_layout import AttentionRows, PackedLayout


class PackedDecoder:
    """An `IncrementalDecoder` over packed layouts.

    Attributes:
        caches: by layer, queries, keys and values [capacity, 3 · heads · head_dim] of all tokens so far.
        num_cached: how many rows of them are in use.
        key_index: by cell, the row of the caches in each slot of its rows [L, S].
    """

    def __init__(self, model: StackedModel, prompts: Sequence[Sequence[Sequence[int]]], group_size: int) -> None:
        self.model = model
        self.trees = [GrowingPrefixTree(listed, group_size) for listed in prompts]
        width = 3 * model.architecture.num_heads * model.architecture.head_dim
        self.caches = [torch.empty(0, width, dtype=model.dtype) for _ in range(model.architecture.num_layers)]
        self.num_cached = 0
        self.key_index: dict[int, Indices] = {}

    def start(self) -> dict[int, Tensor]:
        start, rows = self.num_cached, {}
        for cell, tree in enumerate(self.trees):
            rows[cell] = tree.prefill(self.model.dtype, self.num_cached)
            self._extend(cell, rows[cell])
        return {
            cell: logits.repeat_interleave(self.trees[cell].group_size, 0)
            for cell, logits in self._logits(rows, start).items()
        }

    def step(self, last_tokens: Mapping[int, Tensor], unfinished: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        start, rows, index = self.num_cached, {}, {}
        for cell, tokens in last_tokens.items():
            live, tree = np.array(unfinished[cell]), self.trees[cell]
            gathered = tree.rearrange(live)
            if gathered is not None:
                self.key_index[cell] = self.key_index[cell][gathered]
            step = tree.grow(tokens.numpy(), live)
            keys = np.concatenate((self.key_index[cell], self.num_cached + step.token_of_slot), 1)
            rows[cell] = step.attention_rows(self.model.dtype, keys)
            self._extend(cell, rows[cell])
            index[cell] = torch.from_numpy(step.token_of_trajectory)
        return {cell: logits.index_select(0, index[cell]) for cell, logits in self._logits(rows, start).items()}

    def _extend(self, cell: int, rows: AttentionRows) -> None:
        assert rows.key_index is not None
        self.key_index[cell] = rows.key_index
        self.num_cached += len(rows.tokens)

    def _logits(self, rows: Mapping[int, AttentionRows], start: int) -> dict[int, Tensor]:
        """Logits [J, vocab_size] of each cell's output tokens, whose keys and values are cached."""
        model = self.model
        self._reserve()
        layout = PackedLayout(list(rows), list(rows.values()), model.architecture.num_heads, model.cells, start)
        hidden = packed_forward(model, layout, self.caches).split_with_sizes(layout.output_sizes)
        head = model.lm_head(model.parameters)
        return {cell: torch.mm(each, head[cell]) for cell, each in zip(rows, hidden, strict=True)}

    def _reserve(self) -> None:
        """Double the capacity of caches that are too small."""
        if self.num_cached > len(self.caches[0]):
            for number, cache in enumerate(self.caches):
                self.caches[number] = cache.new_empty(2 * self.num_cached, cache.shape[1])
                self.caches[number][: len(cache)] = cache
