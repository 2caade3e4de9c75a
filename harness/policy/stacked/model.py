"""The weights of C models of one architecture, stacked along a leading cell axis."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from klab.harness.policy.stacked.architecture import Architecture
from klab.harness.policy.stacked.lm_head import float32_linear
from klab.harness.policy.stacked.lora import Adapters
from klab.harness.policy.stacked.native.engine import NativeLayers, native_layers
from klab.harness.policy.stacked.rotary_embedding import RotaryEmbedding

Weights = dict[str, Tensor]
"""Parameters by name, with a leading cell axis or of one cell."""

MAX_COPIED_PARAMETERS = 300_000
"""Up to this many parameters per cell, copying the weights of some cells of a pack together costs less than computing
them in one call saves."""


class StackedModel:
    """Weights of C models.

    Attributes:
        config: the transformers configuration that all cells have.
        architecture: what of it the layers need.
        rotary: the rotary position embedding.
        parameters: name -> [C, …], trained leaf tensors; matrices are [C, in, out]. With adapters, only these.
        shared: name -> [1, …], frozen weights that all cells have in common; empty without adapters.
        adapters: the low-rank adapters, None without.
        cells: C.
        gradient_checkpointing: keep only the layers' inputs for the backward pass, and compute the layers again.
    """

    def __init__(
        self,
        config: Any,
        parameters: Weights,
        shared: Weights | None = None,
        adapters: Adapters | None = None,
        cells: int | None = None,
    ) -> None:
        self.config = config
        self.architecture = Architecture.from_config(config)
        self.rotary = RotaryEmbedding(config, self.architecture.head_dim)
        self.parameters = parameters
        self.shared = shared or {}
        self.adapters = adapters
        self.cells = len(parameters["embedding"]) if cells is None else cells
        self.gradient_checkpointing = False

    @property
    def _embedding(self) -> Tensor:
        return self.shared["embedding"] if self.shared else self.parameters["embedding"]

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights; adapters may have another."""
        return self._embedding.dtype

    @property
    def vocab_size(self) -> int:
        return self.architecture.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.architecture.hidden_size

    @property
    def context_length(self) -> int:
        return self.architecture.context_length

    @property
    def parameters_per_cell(self) -> int:
        """Number of trained parameters of one cell."""
        return sum(value[0].numel() for value in self.parameters.values())

    @property
    def native(self) -> NativeLayers | None:
        """The compiled layers, for models of which all weights are trained, in float32 on a CPU; else None."""
        full = not self.shared and self.adapters is None and not self.gradient_checkpointing
        return self._native if full and self.device.type == "cpu" and self.dtype == torch.float32 else None

    @cached_property
    def _native(self) -> NativeLayers | None:
        return native_layers(self.architecture, self.rotary)

    def stacks(self, shapes: Sequence[Hashable]) -> list[list[int]]:
        """Which cells to compute in one call: those with equal shapes, unless copying their weights together costs
        more than that saves.

        Args:
            shapes: of some cells' inputs.

        Returns:
            indices into `shapes`, in order of first appearance.
        """
        by_shape: dict[Hashable, list[int]] = {}
        for index, shape in enumerate(shapes):
            by_shape.setdefault(shape, []).append(index)
        stacks = list(by_shape.values())
        if len(stacks) == 1 or self.shared or self.parameters_per_cell <= MAX_COPIED_PARAMETERS:
            return stacks
        return [[cell] for cells in stacks for cell in cells]

    def weights(self, stacks: Sequence[Sequence[int]]) -> list[Weights]:
        """All weights of some stacks of cells: the parameters themselves if one stack holds every cell, else copies."""
        if len(stacks) == 1 and list(stacks[0]) == list(range(self.cells)):
            own = [self.parameters]
        else:
            slices = {name: value.unbind(0) for name, value in self.parameters.items()}
            own = [{name: _stack([each[c] for c in cells]) for name, each in slices.items()} for cells in stacks]
        return [self._with_shared(weights, len(cells)) for weights, cells in zip(own, stacks, strict=True)]

    def _with_shared(self, own: Weights, cells: int) -> Weights:
        if not self.shared:
            return own
        return {**{name: value.expand(cells, *value.shape[1:]) for name, value in self.shared.items()}, **own}

    def lm_head(self, weights: Weights) -> Tensor:
        """The output layer [A, hidden_size, vocab_size] of A cells."""
        return weights["embedding"].transpose(1, 2) if self.architecture.tied else weights["head"]

    def logits(self, weights: Weights, hidden: Tensor) -> Tensor:
        """Logits [A, K, vocab_size] of hidden states [A, K, hidden_size], in float32 or wider."""
        return float32_linear(hidden, self.lm_head(weights))


def _stack(slices: Sequence[Tensor]) -> Tensor:
    """Slices of some cells as one stack; a single one is not copied."""
    return slices[0].unsqueeze(0) if len(slices) == 1 else torch.stack(list(slices))


def stack_cells(cells: Sequence[Weights], dtype: torch.dtype, device: torch.device | str) -> Weights:
    """The parameters of single cells as leaf tensors with a leading cell axis."""
    found = {}
    for name in cells[0]:
        stacked = torch.stack([cell[name].to(dtype) for cell in cells]).to(device)
        found[name] = stacked.requires_grad_()
    return found
