"""`Decoding` for policies that compute cells of unequal sizes together: all cells in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from klab.harness.policy.stacked.kv_cache import GrowingPrefixTree
from klab.harness.policy.stacked.packed_layers import final_states
from klab.harness.policy.stacked.packed_layout import AttentionRows, Indices, PackedLayout

if TYPE_CHECKING:
    from klab.harness.policy.stacked.policy import StackedPolicy


class PackedDecoder:
    """The trajectories of every cell of a policy, growing by one token per step.

    Attributes:
        tables: by layer, queries, keys and values [rows, 3 · heads · size] of all tokens so far.
        filled: how many rows of them are in use.
        seen: by cell, the row in each slot of its lanes [L, K].
    """

    def __init__(self, policy: StackedPolicy, prompts: Sequence[Sequence[Sequence[int]]], group_size: int) -> None:
        self.policy = policy
        self.cells = [GrowingPrefixTree(listed, group_size) for listed in prompts]
        width = 3 * policy.architecture.num_heads * policy.architecture.head_dim
        self.tables = [torch.empty(0, width, dtype=policy.dtype) for _ in range(policy.architecture.num_layers)]
        self.filled = 0
        self.seen: dict[int, Indices] = {}

    def start(self) -> dict[int, Tensor]:
        """See `Decoding.start`."""
        plans = {cell: each.start(self.policy.dtype) for cell, each in enumerate(self.cells)}
        return {
            cell: rows.repeat_interleave(self.cells[cell].group_size, 0) for cell, rows in self._logits(plans).items()
        }

    def step(self, newest: Mapping[int, Tensor], open_rows: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        """See `Decoding.step`."""
        lanes, rows = {}, {}
        for cell, tokens in newest.items():
            going, branches = np.array(open_rows[cell]), self.cells[cell]
            gathered = branches.move(going)
            if gathered is not None:
                self.seen[cell] = self.seen[cell][gathered]
            plan = branches.grow(tokens.numpy(), going)
            lanes[cell], rows[cell] = plan.lanes(self.policy.dtype), torch.from_numpy(plan.rows)
        return {cell: each.index_select(0, rows[cell]) for cell, each in self._logits(lanes).items()}

    def _logits(self, lanes: Mapping[int, AttentionRows]) -> dict[int, Tensor]:
        policy, start, placed = self.policy, self.filled, []
        for cell, each in lanes.items():
            before = self.seen.get(cell, np.zeros((len(each.slots), 0), dtype=np.int64))
            self.seen[cell] = np.concatenate((before, self.filled + each.slots), 1)
            placed.append(replace(each, seen=self.seen[cell]))
            self.filled += len(each.tokens)
        self._make_room()
        layout = PackedLayout(list(lanes), placed, policy.architecture.num_heads, policy.cells, start)
        hidden = final_states(policy, layout, self.tables).split_with_sizes(layout.kept_sizes)
        head = policy.head(policy.parameters)
        return {cell: torch.mm(each, head[cell]) for cell, each in zip(lanes, hidden, strict=True)}

    def _make_room(self) -> None:
        if self.filled > len(self.tables[0]):
            for number, table in enumerate(self.tables):
                self.tables[number] = table.new_empty(2 * self.filled, table.shape[1])
                self.tables[number][: len(table)] = table
