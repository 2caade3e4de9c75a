"""What PyTorch's operations do on a CUDA device: which wait for it, which are views, which add in any order."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

aten = torch.ops.aten

WAITING = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten.is_nonzero.default: "bool",
    aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique_consecutive",
    aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
"""Operations whose result the host must know: they wait until the device has computed everything before them."""

COPYING = (aten._to_copy.default, aten.copy_.default)

INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
"""Operations that take indices from the CPU too."""

EMPTY = (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)

NARROW_PRODUCTS = {aten.mm.dtype: torch.mm, aten.bmm.dtype: torch.bmm}
"""Products of 16-bit numbers with float32 sums, which CPUs do not have."""

_WITHOUT_KERNEL = {*EMPTY, aten.detach.default, aten.lift_fresh.default, aten._unsafe_view.default, aten.alias.default}

UNORDERED = {
    "index_add": "index_add",
    "index_add_": "index_add",
    "scatter_add": "scatter_add",
    "scatter_add_": "scatter_add",
    "scatter_reduce": "scatter_reduce",
    "bincount": "bincount",
    "histc": "histc",
    "_efficient_attention_backward": "attention",
    "_flash_attention_backward": "attention",
}
"""Operations that add numbers in the order in which threads arrive: other last digits each time (see
`torch.use_deterministic_algorithms`)."""


@cache
def is_view(func: Any) -> bool:
    """Whether the operation launches no kernel."""
    if func in _WITHOUT_KERNEL:
        return True
    returned = func._schema.returns
    return bool(returned) and any(r.alias_info is not None and not r.alias_info.is_write for r in returned)


@cache
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that the operation changes in place."""
    given = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in given if a.alias_info is not None and a.alias_info.is_write)


@cache
def is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


@cache
def unordered_sum(func: Any) -> str | None:
    """What the operation is called in `UNORDERED`, if it is there."""
    return UNORDERED.get(func._schema.name.split("::")[1])


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """What the operation gives on the CPU."""
    if func in NARROW_PRODUCTS:
        left, right, dtype = args
        return NARROW_PRODUCTS[func](left.to(dtype), right.to(dtype))
    return func(*args, **kwargs)
