"""Buckets of numbers: what processes sum at a time, in place of one exchange per tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_BUCKET = 2**24
"""Numbers that are summed at a time."""


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Flat views of one kind of number each, together at most `_BUCKET` numbers."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).extend(torch.split(tensor.view(-1), _BUCKET))
    for parts in kinds.values():
        bucket: list[Tensor] = []
        for part in parts:
            if bucket and sum(map(len, bucket)) + len(part) > _BUCKET:
                yield bucket
                bucket = []
            bucket.append(part)
        yield bucket
