"""The weight axis: w(ρ, A), what multiplies A·∇ℓ of a token.

Every function takes the ratio ρ and the advantage A, `[N, T]` each, both without gradient. A surrogate f(ρ)·A has the
weight ρ·f′(ρ); the functions here are the weights themselves. The catalogue states of each
whether it stays within [min(ρ, 1), max(ρ, 1)] (the family of Bai & Zhang 2026) and is non-decreasing in ρ.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from klab.harness.objective.registry import Registry

WEIGHTS = Registry("weight")

_ROUNDS, _CUTS = 11, 8
"""Rounds of the search for `adaptive`, and how many parts each divides the bracket into: 8^-11 ≈ 1e-10."""


def zero_preserving_product(left: Float[Tensor, "N T"], right: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """left·right with 0·∞ = 0: a token without advantage, or whose weight vanishes, moves nothing, also where ρ
    overflows. NaN stays NaN, so that a reward that is not a number is never taken for 0."""
    vanishes = ((left == 0) & right.isinf()) | ((right == 0) & left.isinf())
    return torch.where(vanishes, 0.0, left * right)


@WEIGHTS.register("one")
def constant_one(ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """1: no importance weight."""
    return torch.ones_like(ratio)


@WEIGHTS.register("ratio")
def plain_ratio(ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """ρ: plain importance sampling."""
    return ratio


def unclipped(
    ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"], eps_low: float, eps_high: float
) -> Bool[Tensor, "N T"]:
    """Where PPO's clipping leaves the gradient."""
    return (ratio - ratio.clamp(1 - eps_low, 1 + eps_high)) * advantage <= 0


@WEIGHTS.register("ppo_clip")
def ppo_clip(
    ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"], *, eps_low: float, eps_high: float
) -> Float[Tensor, "N T"]:
    """ρ·1[(ρ − clip(ρ))·A ≤ 0]: the gradient of min(ρA, clip(ρ, 1−ε_low, 1+ε_high)·A) (Schulman et al. 2017)."""
    return torch.where(unclipped(ratio, advantage, eps_low, eps_high), ratio, 0.0)


@WEIGHTS.register("dual_clip")
def dual_clip(
    ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"], *, eps_low: float, eps_high: float, c: float
) -> Float[Tensor, "N T"]:
    """`ppo_clip`, and 0 where A < 0 and ρ > c (Ye et al. 2020)."""
    kept = unclipped(ratio, advantage, eps_low, eps_high) & ~((advantage < 0) & (ratio > c))
    return torch.where(kept, ratio, 0.0)


@WEIGHTS.register("truncate")
def truncate(ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"], *, cap: float) -> Float[Tensor, "N T"]:
    """min(ρ, cap) (CISPO, MiniMax 2025; truncated importance sampling, Yao et al. 2025)."""
    return ratio.clamp(max=cap)


@WEIGHTS.register("clamp")
def clamp(
    ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"], *, eps_low: float, eps_high: float
) -> Float[Tensor, "N T"]:
    """clip(ρ, 1−ε_low, 1+ε_high)."""
    return ratio.clamp(1 - eps_low, 1 + eps_high)


@WEIGHTS.register("truncate_clip")
def truncate_clip(
    ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"], *, eps_low: float, eps_high: float
) -> Float[Tensor, "N T"]:
    """min(ρ, 1+ε_high) where PPO does not clip, else 0 (upper clipping as Bai & Zhang 2026 can also be read)."""
    return torch.where(unclipped(ratio, advantage, eps_low, eps_high), ratio.clamp(max=1 + eps_high), 0.0)


@WEIGHTS.register("power")
def power(ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"], *, q: float) -> Float[Tensor, "N T"]:
    """ρ^q (the power family of Bai & Zhang 2026)."""
    return ratio**q


@WEIGHTS.register("mask")
def ratio_mask(
    ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"], *, low: float, high: float
) -> Float[Tensor, "N T"]:
    """ρ where low ≤ ρ ≤ high, else 0 (IcePop, Ling Team 2025)."""
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


@WEIGHTS.register("sigmoid")
def sigmoid(
    ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"], *, tau_pos: float, tau_neg: float
) -> Float[Tensor, "N T"]:
    """4ρ·p(1−p) with p = σ(τ(ρ−1)), τ = τ_pos where A > 0, else τ_neg (SAPO, Gao et al. 2025)."""
    gate = torch.sigmoid(torch.where(advantage > 0, tau_pos * (ratio - 1), tau_neg * (ratio - 1)))
    return zero_preserving_product(4 * ratio, gate * (1 - gate))


@WEIGHTS.register("adaptive")
def adaptive(
    ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"], *, q: Float[Tensor, ""]
) -> Float[Tensor, "N T"]:
    """ρ^q with the exponent that `largest_exponent` found for the whole update."""
    return ratio**q


def largest_exponent(
    log_ratio: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], *, ess: float
) -> dict[str, Float[Tensor, ""]]:
    """The largest q in [0, 1] for which ρ^q keeps an effective sample size (Σw)²/(n·Σw²) ≥ `ess` over the n own tokens.

    The share decreases in q from 1 at q = 0, so q is bracketed: eleven rounds that each divide the bracket by eight
    find it to 1e-9.

    Args:
        log_ratio: log ρ `[N, T]` of the whole update.
        mask: own tokens, bool `[N, T]`.

    Returns:
        {"q": scalar in the type of `log_ratio`}.
    """
    exponents = torch.where(mask, log_ratio.double(), -torch.inf).flatten()
    exponents = exponents - exponents.amax()
    least = ess * mask.sum().double()

    def enough(q: Float[Tensor, ""]) -> Tensor:
        weights = (q[:, None] * exponents).exp()
        return weights.sum(1).square() >= least * weights.square().sum(1)

    cuts = torch.arange(1, _CUTS, dtype=torch.float64, device=log_ratio.device) / _CUTS
    low, width = torch.zeros_like(cuts[:1]), 1.0
    for _ in range(_ROUNDS):
        low = low + width / _CUTS * enough(low + width * cuts).sum()
        width /= _CUTS
    top = torch.ones_like(low)
    return {"q": torch.where(enough(top), top, low)[0].to(log_ratio.dtype)}
