"""Linear value heads on final hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ValueHead:
    """One per cell: V = ⟨weight, state⟩ + bias, 0 everywhere at first.

    Attributes:
        parameters: `value.weight` [C, width] and `value.bias` [C, 1], leaf tensors.
    """

    def __init__(self, cells: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        shapes = {"value.weight": (cells, width), "value.bias": (cells, 1)}
        self.parameters = {
            name: torch.zeros(shape, dtype=dtype, device=device).requires_grad_() for name, shape in shapes.items()
        }

    def __call__(self, states: Sequence[Tensor]) -> list[Tensor]:
        """V [N, T] of each cell's states [N, T, width]."""
        weights, biases = (value.unbind(0) for value in self.parameters.values())
        return [
            each.to(weight.dtype) @ weight + bias for each, weight, bias in zip(states, weights, biases, strict=True)
        ]
