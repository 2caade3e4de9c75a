"""`Decoding` for policies that compute cells of unequal sizes together: all cells in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from harness.policy.decoding import Branches
from harness.policy.layer_weights import LayerWeights, layers_of
from harness.policy.layout import Lanes, Layout
from harness.policy.ragged import Cached, final_states

if TYPE_CHECKING:
    from harness.policy.decoder import Decoder


class RaggedDecoding:
    """The trajectories of every cell of a policy, growing by one token per step.

    `caches`: keys and values by cell and layer.
    """

    def __init__(self, policy: Decoder, prompts: Sequence[Sequence[Sequence[int]]], group_size: int) -> None:
        self.policy = policy
        self.cells = [Branches(listed, group_size) for listed in prompts]
        self.caches: list[list[Cached | None]] = [[None] * policy.architecture.layers for _ in prompts]
        self._weights: dict[tuple[int, ...], list[LayerWeights]] = {}

    def start(self) -> dict[int, Tensor]:
        """See `Decoding.start`."""
        logits = self._logits(range(len(self.cells)), [each.start(self.policy.dtype) for each in self.cells])
        return {cell: rows.repeat_interleave(self.cells[cell].group_size, 0) for cell, rows in logits.items()}

    def step(self, newest: Mapping[int, Tensor], open_rows: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        """See `Decoding.step`."""
        plans = {}
        for cell, tokens in newest.items():
            going, branches = np.array(open_rows[cell]), self.cells[cell]
            lanes, gathered = branches.lanes, branches.move(going)
            if gathered is not None:
                origin, slots = (torch.from_numpy(index) for index in gathered)
                self.caches[cell] = [_moved(pair, lanes, origin, slots) for pair in self.caches[cell]]
            plans[cell] = branches.grow(tokens.numpy(), going)
        logits = self._logits(list(plans), [plan.lanes(self.policy.dtype) for plan in plans.values()])
        return {cell: rows.index_select(0, torch.from_numpy(plans[cell].rows)) for cell, rows in logits.items()}

    def _logits(self, cells: Sequence[int], lanes: Sequence[Lanes]) -> dict[int, Tensor]:
        policy = self.policy
        layout = Layout(cells, lanes, policy.architecture.heads)
        by_layer = [list(row) for row in zip(*(self.caches[cell] for cell in cells), strict=True)]
        weights = self._weights.setdefault(tuple(cells), [])
        if not weights:
            weights += layers_of(policy, cells)
        hidden = final_states(policy, layout, by_layer, weights).split_with_sizes(layout.kept_sizes)
        for cell, pairs in zip(cells, zip(*by_layer, strict=True), strict=True):
            self.caches[cell] = list(pairs)
        head = policy.head(policy.parameters)
        return {cell: torch.mm(each, head[cell]) for cell, each in zip(cells, hidden, strict=True)}


def _moved(pair: Cached | None, lanes: int, origin: Tensor, slots: Tensor) -> Cached:
    """A cache gathered into other lanes [new, 1] and slots [new, new slots]."""
    assert pair is not None
    keys, values = (x.view(-1, lanes, *x.shape[1:])[:, origin, slots].flatten(0, 1) for x in pair)
    return keys, values
