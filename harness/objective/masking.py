"""Masked sums and layouts along the own tokens of a trajectory.

Every function takes `[N, T]` tensors. Entries at other positions (padding, environment tokens) must be 0 or are masked
here, so that gaps between own tokens make no difference.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def masked(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    """`values` at own tokens and 0 elsewhere. What stands elsewhere gets no gradient, even where it is NaN."""
    return torch.where(mask, values, 0.0)


def suffix_sum(values: Shaped[Tensor, "N T"]) -> Shaped[Tensor, "N T"]:
    """Σ_{i≥j} values_i along the last axis."""
    return values.flip(-1).cumsum(-1).flip(-1)


def discounted_suffix_sum(values: Float[Tensor, "N T"], discount: float) -> Float[Tensor, "N T"]:
    """Σ_{i≥j} discount^{i−j}·values_i along the last axis."""
    if discount == 1.0:
        return suffix_sum(values)
    step = torch.arange(values.shape[1], device=values.device, dtype=values.dtype)
    ahead = step[:, None] - step[None, :]
    return values @ torch.where(ahead >= 0, discount ** ahead.clamp(min=0), 0.0)


def lengths(mask: Bool[Tensor, "N T"]) -> Int[Tensor, "N 1"]:
    """H: the number of own tokens of each trajectory."""
    return mask.sum(1, keepdim=True)


def last_token_mask(mask: Bool[Tensor, "N T"]) -> Bool[Tensor, "N T"]:
    """True on the last own token of each trajectory that has one."""
    return mask & (mask.cumsum(1) == lengths(mask))


def left_align(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Own tokens moved to the front in their order, 0 behind them: column j holds the (j+1)-th own token."""
    width = mask.shape[1]
    target = torch.where(mask, mask.cumsum(1) - 1, width)
    room = torch.zeros(mask.shape[0], width + 1, dtype=values.dtype, device=values.device)
    return room.scatter(1, target, values)[:, :width]


def undo_left_align(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """The inverse of `left_align` at own tokens; entries elsewhere are arbitrary and must be masked."""
    return values.gather(1, (mask.cumsum(1) - 1).clamp(min=0))


def masked_quantile(
    values: Float[Tensor, "*batch K"], mask: Bool[Tensor, "*batch K"], share: float
) -> Float[Tensor, "*batch 1"]:
    """The quantile of the masked values along the last axis, linear between two of them as in `torch.quantile`;
    infinite where there is none. Control flow does not depend on values, so that it can be mapped."""
    ordered = torch.where(mask, values, torch.inf).sort(-1).values
    place = share * (mask.sum(-1, keepdim=True) - 1).clamp(min=0).double()
    low = place.floor().long()
    below, above = ordered.gather(-1, low), ordered.gather(-1, place.ceil().long())
    return torch.where(below == above, below, torch.lerp(below, above, (place - low).to(values.dtype)))
