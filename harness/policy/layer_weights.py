"""The parameters of a stacked decoder's layers, cell by cell, for `harness.policy.ragged`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from harness.policy.architecture import Architecture

if TYPE_CHECKING:
    from harness.policy.decoder import Decoder

NAMES = ("input_norm", "qkv", "qkv_bias", "out", "out_bias", "mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias")
"""Parameters of a layer, in one order; biases may be absent."""

Slices = list[Tensor]
"""By cell."""


def suits(architecture: Architecture) -> bool:
    """Whether these layers are of this architecture: as many key-value heads as heads, no norm on them.

    Widths are multiples of 16 numbers, so that every cell's stretch begins where memory that is allocated alone does:
    the bits of products depend on that.
    """
    a = architecture
    aligned = all(width % 16 == 0 for width in (a.hidden, a.heads * a.head_size, a.intermediate))
    return aligned and a.kv_heads == a.heads and not a.qk_norm


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's parameters, cell by cell: slices of the stack, without a copy."""

    input_norm: Slices
    qkv: Slices
    qkv_bias: Slices | None
    out: Slices
    out_bias: Slices | None
    mlp_norm: Slices
    gate_up: Slices
    gate_up_bias: Slices | None
    down: Slices
    down_bias: Slices | None

    @classmethod
    def of(cls, stacked: Sequence[Tensor | None], cells: Sequence[int]) -> LayerWeights:
        """Of some cells, from the parameters [C, …] named by `NAMES`."""
        slices = []
        for value in stacked:
            every = None if value is None else value.unbind(0)
            slices.append(None if every is None else [every[c] for c in cells])
        return cls(*slices)  # type: ignore[arg-type]


def layers_of(policy: Decoder, cells: Sequence[int]) -> list[LayerWeights]:
    """The layers' parameters of some cells."""
    return [LayerWeights.of(stacked_layer(policy, number), cells) for number in range(policy.architecture.layers)]


def stacked_layer(policy: Decoder, number: int) -> list[Tensor | None]:
    """One layer's parameters [C, …] in the order of `NAMES`."""
    return [policy.parameters.get(f"layers.{number}.{name}") for name in NAMES]
