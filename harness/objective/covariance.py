"""Weights that single out tokens by their part of Cov(A, ℓ), the covariance that lowers a policy's entropy (Cui et al.
2025), and penalties of weights: terms of the loss that belong to a weight and are no multiple of A.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klab.harness.objective.weight import WEIGHTS, ppo_clip, unclipped

ROUNDING = 1e-5
"""Log-ratios to the behaviour policy up to this size are rounding between decoding and scoring."""


@WEIGHTS.register("clip_cov")
def clip_cov(
    ratio: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"],
    *,
    dropped: Bool[Tensor, "N T"],
    eps_low: float,
    eps_high: float,
) -> Float[Tensor, "N T"]:
    """`ppo_clip`, and 0 at the tokens that `drawn_tokens` drops (Clip-Cov, Cui et al. 2025)."""
    return torch.where(dropped, 0.0, ppo_clip(ratio, advantage, eps_low=eps_low, eps_high=eps_high))


def drawn_tokens(
    log_rho: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    advantage: Float[Tensor, "N T"],
    logp: Float[Tensor, "N T"],
    update: int,
    cov_share: float,
    cov_low: float,
    cov_high: float,
    eps_low: float,
    eps_high: float,
) -> dict[str, Bool[Tensor, "N T"]]:
    """max(1, ⌊cov_share·n⌋) of the n own tokens, drawn from those with cov_low < (A − Ā)·(ℓ − ℓ̄) < cov_high that PPO
    does not clip; all of these where there are no more.

    verl draws with torch's global generator. Here a token's random number is a function of the update's number and of
    the token's among the update's own tokens, so that an update that is repeated, resumed or cut up drops the same.

    Returns:
        {"dropped": whether each token's weight is 0}.
    """
    parts = _parts(advantage, logp, mask)
    free = unclipped(log_rho.exp(), advantage, eps_low, eps_high)
    candidates = mask & free & (parts > cov_low) & (parts < cov_high)
    number = mask.flatten().cumsum(0).view_as(mask)
    chosen = _smallest(torch.where(candidates, _uniform(number, update), torch.inf), _count(mask, cov_share))
    return {"dropped": chosen & candidates}


@WEIGHTS.register("kl_cov")
def kl_cov(
    ratio: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"],
    *,
    penalised: Bool[Tensor, "N T"],
    cov_penalty: float,
) -> Float[Tensor, "N T"]:
    """ρ: what the weight does to tokens of large covariance is its penalty (KL-Cov, Cui et al. 2025)."""
    return ratio


def largest_tokens(
    log_rho: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    advantage: Float[Tensor, "N T"],
    logp: Float[Tensor, "N T"],
    cov_share: float,
) -> dict[str, Bool[Tensor, "N T"]]:
    """The max(1, ⌊cov_share·n⌋) of the n own tokens with the largest (A − Ā)·(ℓ − ℓ̄); of equal ones the first.

    Returns:
        {"penalised": whether each token is one of them}.
    """
    keys = torch.where(mask, -_parts(advantage, logp, mask).double(), torch.inf)
    return {"penalised": _smallest(keys, _count(mask, cov_share)) & mask}


def _parts(advantage: Tensor, logp: Tensor, mask: Tensor) -> Float[Tensor, "N T"]:
    """(A − Ā)·(ℓ − ℓ̄), means over the own tokens; both are 0 off them."""
    count = mask.sum().clamp(min=1)
    return (advantage - torch.where(mask, advantage, 0.0).sum() / count) * (
        logp - torch.where(mask, logp, 0.0).sum() / count
    )


def _count(mask: Tensor, share: float) -> Float[Tensor, ""]:
    return (share * mask.sum().double()).floor().clamp(min=1)


def _smallest(keys: Float[Tensor, "N T"], count: Float[Tensor, ""]) -> Bool[Tensor, "N T"]:
    """Where the `count` smallest keys stand; of equal ones the first."""
    order = keys.flatten().argsort(stable=True)
    rank = torch.arange(order.numel(), device=keys.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter(0, order, rank < count).view_as(keys)


def _uniform(number: Int[Tensor, "*tokens"], update: int) -> Float[Tensor, "*tokens"]:
    """A number in [0, 1) for each token of an update: the finaliser of SplitMix64 in 32-bit steps (lowbias32)."""
    low = 0xFFFFFFFF
    mixed = (number * 0x9E3779B1 + (update + 1) * 0x85EBCA6B % (low + 1)) & low
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & low
    return (mixed ^ (mixed >> 15)).double() / (low + 1)


def covariance_penalty(
    log_ratio: Float[Tensor, "N T"], *, penalised: Bool[Tensor, "N T"], cov_penalty: float
) -> Float[Tensor, "N T"]:
    """cov_penalty·|λ| at the tokens of the largest covariance (KL-Cov, Cui et al. 2025).

    Where |λ| ≤ `ROUNDING` there is none: in the first update after a rollout λ is rounding, and its sign would be a
    gradient of full size in a random direction.
    """
    return torch.where(penalised & (log_ratio.abs() > ROUNDING), cov_penalty * log_ratio.abs(), 0.0)


def square_penalty(log_ratio: Float[Tensor, "N T"], *, band: float, band_penalty: float) -> Float[Tensor, "N T"]:
    """band_penalty·λ² (prime-rl's ipo)."""
    return band_penalty * log_ratio.square()


PENALTIES: MappingProxyType[str, Callable[..., Tensor]] = MappingProxyType(
    {"kl_cov": covariance_penalty, "tv_band": square_penalty}
)
"""Per-token terms that weights add to the loss: functions of λ `[N, T]` with gradient, and of the weight's
parameters."""
