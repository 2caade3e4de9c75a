"""The parameters of one layer of a stacked decoder, for `klab.harness.policy.stacked.packed_layers`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from klab.harness.policy.stacked.config import Architecture

if TYPE_CHECKING:
    from klab.harness.policy.stacked.policy import StackedPolicy


def suits(architecture: Architecture) -> bool:
    """Whether these layers are of this architecture: as many key-value heads as heads, no norm on them.

    Widths are multiples of 16 numbers, so that every cell's stretch begins where memory that is allocated alone does:
    the bits of products depend on that.
    """
    a = architecture
    aligned = all(width % 16 == 0 for width in (a.hidden_size, a.num_heads * a.head_dim, a.intermediate_size))
    return aligned and a.num_kv_heads == a.num_heads and not a.qk_norm


class LayerWeights(NamedTuple):
    """One layer's parameters [C, …], or their gradients; biases may be absent."""

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
    def of(cls, policy: StackedPolicy, number: int) -> LayerWeights:
        """Those of a layer."""
        return cls(*(policy.parameters.get(f"layers.{number}.{name}") for name in cls._fields))  # type: ignore[arg-type]
