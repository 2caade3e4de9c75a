"""The parameters of one decoder layer as a named tuple, and which architectures the packed layers support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from klab.harness.policy.stacked.architecture import Architecture


def supports_packing(architecture: Architecture) -> bool:
    """Whether `packed_layers.py` computes this architecture: plain multi-head attention without norms on heads.

    Widths must be multiples of 16 numbers, so that every cell's segment begins at an aligned address, as memory that
    is allocated for it alone does: the bits of a matrix product depend on the alignment of its operands.
    """
    a = architecture
    aligned = all(width % 16 == 0 for width in (a.hidden_size, a.num_heads * a.head_dim, a.intermediate_size))
    return aligned and a.num_kv_heads == a.num_heads and not a.qk_norm


class LayerWeights(NamedTuple):
    """One layer's parameters [C, …] of C cells, or their gradients; architectures without biases have None."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    @classmethod
    def of_layer(cls, parameters: Mapping[str, Tensor], layer: int) -> LayerWeights:
        """Those of one layer among all parameters of a stack."""
        return cls(*(parameters.get(f"layers.{layer}.{name}") for name in cls._fields))  # type: ignore[arg-type]
