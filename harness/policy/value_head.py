"""Linear value heads on the final hidden states of C policies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class ValueHead:
    """One head per cell: V(state) = ⟨weight, state⟩ + bias, initially 0.

    Attributes:
        parameters: `value.weight` [C, hidden_size] and `value.bias` [C, 1], leaf tensors.
    """

    def __init__(self, cells: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        shapes = {"value.weight": (cells, hidden_size), "value.bias": (cells, 1)}
        self.parameters = {
            name: torch.zeros(shape, dtype=dtype, device=device).requires_grad_() for name, shape in shapes.items()
        }

    def __call__(self, states: Sequence[Float[Tensor, "N T hidden_size"]]) -> list[Float[Tensor, "N T"]]:
        """Values of each cell's states."""
        weights, biases = (value.unbind(0) for value in self.parameters.values())
        return [
            each.to(weight.dtype) @ weight + bias for each, weight, bias in zip(states, weights, biases, strict=True)
        ]
