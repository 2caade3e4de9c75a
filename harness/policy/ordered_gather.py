"""Gathers whose gradients are sums in a fixed order, on CPUs and on GPUs.

The gradient of a gather adds what was gathered more than once. On GPUs those of `index_select` and `gather` add in the
order in which threads arrive, with other last digits each time; that of an index in brackets sorts the index first.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def take_rows(values: Float[Tensor, "K ..."], index: Int[Tensor, " M"]) -> Float[Tensor, "M ..."]:
    """`values[index]`."""
    return values.index_select(0, index) if values.device.type == "cpu" else values[index]
