"""Weights that damp instead of cutting off, and those that look beyond the ratio of the token."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from klab.harness.objective.masking import discounted_suffix_sum, left_align, undo_left_align
from klab.harness.objective.weight import WEIGHTS, ppo_clip, zero_preserving_product


@WEIGHTS.register("gamma_kernel")
def gamma_kernel(
    ratio: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"],
    *,
    k_pos: float,
    rate_pos: float,
    k_neg: float,
    rate_neg: float,
) -> Float[Tensor, "N T"]:
    """ρ^k·e^{r·(1−ρ)}, (k, r) = (k_pos, rate_pos) where A ≥ 0, else (k_neg, rate_neg): 1 at ρ = 1, largest at ρ = k/r
    (VESPO, Shen et al. 2026, with the ratio `sequence_product`)."""
    positive = advantage >= 0
    rate = torch.where(positive, rate_pos, rate_neg).to(ratio.dtype)
    exponent = torch.where(positive, k_pos, k_neg).to(ratio.dtype)
    return torch.where(ratio.isinf(), 0.0, (torch.xlogy(exponent, ratio) + rate * (1 - ratio)).exp())


@WEIGHTS.register("drpo_tv")
def drpo_tv(
    ratio: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"],
    *,
    logp: Float[Tensor, "N T"],
    logp_behaviour: Float[Tensor, "N T"],
    tv_scale: float,
) -> Float[Tensor, "N T"]:
    """ρ·(1 − sign(A)·(π − π_old)/tv_scale): the gradient of ρA − |A|·π_old·(ρ − 1)²/(2·tv_scale), negative where the
    token has moved further in the direction of A than tv_scale (DRPO, Yao et al. 2026b)."""
    moved = logp.exp().clamp(max=1) - logp_behaviour.exp().clamp(max=1)  # log-probabilities above 0 are rounding
    return zero_preserving_product(ratio, 1 - advantage.sign() * moved / tv_scale)


@WEIGHTS.register("tapered")
def tapered(ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """1 where A > 0, else min(ρ, 1) (TOPR, Le Roux et al. 2025, with the ratio `sequence_product`)."""
    return torch.where(advantage > 0, 1.0, ratio.clamp(max=1.0))


@WEIGHTS.register("future_kl")
def future_kl(
    ratio: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"],
    *,
    log_ratio: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    eps_low: float,
    eps_high: float,
    half_life: float,
    influence: float,
    safety: float,
) -> Float[Tensor, "N T"]:
    """`ppo_clip` times f_j = clip(e^{Σ_{i≥j} γ^{i−j}·λ_i}, 1, 1 + influence), γ = 2^{−1/half_life}; where A < 0 and
    ρ > safety, f_j is clipped to [0.8, 1] once more (FIPO, Ma et al. 2026)."""
    gamma = 0.5 ** (1 / half_life)
    ahead = undo_left_align(discounted_suffix_sum(left_align(log_ratio, mask), gamma), mask)
    factor = ahead.exp().clamp(1.0, 1.0 + influence)
    factor = torch.where((advantage < 0) & (ratio > safety), factor.clamp(0.8, 1.0), factor)
    return factor * ppo_clip(ratio, advantage, eps_low=eps_low, eps_high=eps_high)
