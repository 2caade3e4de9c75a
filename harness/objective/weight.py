"""Weights w(ρ, A): what multiplies the score A·∇ℓ of a token.

Every function takes the ratio ρ and the advantage A, `[N, T]` each, both without gradient. A surrogate f(ρ)·A has the
weight ρ·f′(ρ); the functions here are the weights themselves. Which of them stay in S1's family [min(ρ,1), max(ρ,1)]
and are non-decreasing in ρ is stated in the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from klab.harness.objective.registry import Registry

WEIGHTS = Registry("weight", "ratio", "advantage")

_ROUNDS, _CUTS = 11, 8  # 8^-11 ≈ 1e-10


@WEIGHTS.register("one")
def constant_one(ratio: Tensor, advantage: Tensor) -> Tensor:
    """1 (S1, q = 0)."""
    return torch.ones_like(ratio)


@WEIGHTS.register("ratio")
def plain_ratio(ratio: Tensor, advantage: Tensor) -> Tensor:
    """ρ (S1, q = 1)."""
    return ratio


def _unclipped(ratio: Tensor, advantage: Tensor, eps_low: float, eps_high: float) -> Tensor:
    return (ratio - ratio.clamp(1 - eps_low, 1 + eps_high)) * advantage <= 0


@WEIGHTS.register("ppo_clip")
def ppo_clip(ratio: Tensor, advantage: Tensor, *, eps_low: float, eps_high: float) -> Tensor:
    """ρ·1[(ρ − clip(ρ))·A ≤ 0]: the gradient of min(ρA, clip(ρ, 1−ε_low, 1+ε_high)·A)."""
    return torch.where(_unclipped(ratio, advantage, eps_low, eps_high), ratio, 0.0)


@WEIGHTS.register("dual_clip")
def dual_clip(ratio: Tensor, advantage: Tensor, *, eps_low: float, eps_high: float, c: float) -> Tensor:
    """`ppo_clip`, and 0 where A < 0 and ρ > c (Ye et al. 2020)."""
    kept = _unclipped(ratio, advantage, eps_low, eps_high) & ~((advantage < 0) & (ratio > c))
    return torch.where(kept, ratio, 0.0)


@WEIGHTS.register("truncate")
def truncate(ratio: Tensor, advantage: Tensor, *, cap: float) -> Tensor:
    """min(ρ, cap) (S1's upper clipping; CISPO and TIS with other caps)."""
    return ratio.clamp(max=cap)


@WEIGHTS.register("clamp")
def clamp(ratio: Tensor, advantage: Tensor, *, eps_low: float, eps_high: float) -> Tensor:
    """clip(ρ, 1−ε_low, 1+ε_high)."""
    return ratio.clamp(1 - eps_low, 1 + eps_high)


@WEIGHTS.register("truncate_clip")
def truncate_clip(ratio: Tensor, advantage: Tensor, *, eps_low: float, eps_high: float) -> Tensor:
    """min(ρ, 1+ε_high) where PPO does not clip, else 0 (S1's other reading of upper clipping)."""
    return torch.where(_unclipped(ratio, advantage, eps_low, eps_high), ratio.clamp(max=1 + eps_high), 0.0)


@WEIGHTS.register("power")
def power(ratio: Tensor, advantage: Tensor, *, q: float) -> Tensor:
    """ρ^q (S1)."""
    return ratio**q


@WEIGHTS.register("mask")
def ratio_mask(ratio: Tensor, advantage: Tensor, *, low: float, high: float) -> Tensor:
    """ρ where low ≤ ρ ≤ high, else 0 (IcePop)."""
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


@WEIGHTS.register("sigmoid")
def sigmoid(ratio: Tensor, advantage: Tensor, *, tau_pos: float, tau_neg: float) -> Tensor:
    """4ρ·p(1−p) with p = σ(τ(ρ−1)), τ = τ_pos where A > 0, else τ_neg (SAPO)."""
    gate = torch.sigmoid(torch.where(advantage > 0, tau_pos * (ratio - 1), tau_neg * (ratio - 1)))
    return 4 * ratio * gate * (1 - gate)


@WEIGHTS.register("adaptive")
def adaptive(ratio: Tensor, advantage: Tensor, *, q: Tensor) -> Tensor:
    """ρ^q with the exponent that `largest_exponent` found for the whole update."""
    return ratio**q


def largest_exponent(log_ratio: Tensor, mask: Tensor, *, ess: float) -> dict[str, Tensor]:
    """The largest q in [0, 1] for which ρ^q keeps an effective sample size (Σw)²/(n·Σw²) ≥ `ess` over the n own tokens.

    The share decreases in q (it is 1 at q = 0), so that cutting the interval in eight, eleven times, finds q to 1e-9.

    Args:
        log_ratio: log ρ `[N, T]` of the whole update.
        mask: own tokens, bool `[N, T]`.

    Returns:
        {"q": scalar in the type of `log_ratio`}.
    """
    exponents = torch.where(mask, log_ratio.double(), -torch.inf).flatten()
    exponents = exponents - exponents.amax()
    least = ess * mask.sum().double()

    def enough(q: Tensor) -> Tensor:
        weights = (q[:, None] * exponents).exp()
        return weights.sum(1).square() >= least * weights.square().sum(1)

    cuts = torch.arange(1, _CUTS, dtype=torch.float64, device=log_ratio.device) / _CUTS
    low, width = torch.zeros_like(cuts[:1]), 1.0
    for _ in range(_ROUNDS):
        low = low + width / _CUTS * enough(low + width * cuts).sum()
        width /= _CUTS
    top = torch.ones_like(low)
    return {"q": torch.where(enough(top), top, low)[0].to(log_ratio.dtype)}


SOLVERS: dict[str, Callable[..., dict[str, Tensor]]] = {"adaptive": largest_exponent}
"""Weights whose parameters are found once per update, from log ρ and the mask of the whole of it."""
