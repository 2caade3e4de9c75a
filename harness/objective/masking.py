"""Sums and layouts along a trajectory's own tokens.

Every function takes `[N, T]` tensors whose entries at other positions (padding, environment tokens) are 0 or are masked
here, so that gaps between own tokens never matter.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` at own tokens and 0 elsewhere; whatever stands elsewhere, NaN included, gets no gradient."""
    return torch.where(mask, values, 0.0)


def suffix_sum(values: Tensor) -> Tensor:
    """Σ_{i≥j} values_i along the last axis."""
    return values.flip(-1).cumsum(-1).flip(-1)


def lengths(mask: Tensor) -> Tensor:
    """H `[N, 1]`: the number of own tokens of each trajectory, as integers."""
    return mask.sum(1, keepdim=True)


def last_token_mask(mask: Tensor) -> Tensor:
    """bool `[N, T]`: true on the last own token of each trajectory that has one."""
    return mask & (mask.cumsum(1) == lengths(mask))


def left_align(values: Tensor, mask: Tensor) -> Tensor:
    """Own tokens moved to the front in their order, 0 behind them: column j holds the (j+1)-th own token."""
    width = mask.shape[1]
    target = torch.where(mask, mask.cumsum(1) - 1, width)
    room = torch.zeros(mask.shape[0], width + 1, dtype=values.dtype, device=values.device)
    return room.scatter(1, target, values)[:, :width]


def undo_left_align(values: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `left_align`: each own token reads its column; other positions read some column, to be masked."""
    return values.gather(1, (mask.cumsum(1) - 1).clamp(min=0))
