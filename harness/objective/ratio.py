"""The importance-ratio axis: log ρ_j from the tokens' log-ratios λ = ℓ − ℓ_old to the behaviour policy.

Every function takes λ, 0 off the own tokens, and the mask of own tokens, and returns log ρ; entries off the own tokens
are ignored. Sums run over own tokens: i ≥ j means the own tokens from j on.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from klab.harness.objective.masking import lengths, masked, suffix_sum
from klab.harness.objective.registry import Registry

RATIOS = Registry("ratio")


@RATIOS.register("none")
def no_ratio(log_ratio: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """log ρ = 0: no correction."""
    return torch.zeros_like(log_ratio)


@RATIOS.register("token")
def token(log_ratio: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """λ_j (PPO, Schulman et al. 2017; GRPO, Shao et al. 2024)."""
    return log_ratio


@RATIOS.register("sequence_mean")
def sequence_mean(log_ratio: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """(1/H)·Σ_i λ_i: the geometric mean over the trajectory (GSPO, Zheng et al. 2025a)."""
    return (log_ratio.sum(1, keepdim=True) / lengths(mask).clamp(min=1)).expand_as(log_ratio)


@RATIOS.register("future_mean")
def future_mean(log_ratio: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """(1/(H−j+1))·Σ_{i≥j} λ_i: the geometric mean over the tokens from j on (Bai & Zhang 2026)."""
    return suffix_sum(log_ratio) / suffix_sum(mask).clamp(min=1)


@RATIOS.register("sequence_product")
def sequence_product(log_ratio: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Σ_i λ_i: exact importance sampling of the trajectory (RLOO in TRL)."""
    return log_ratio.sum(1, keepdim=True).expand_as(log_ratio)


@RATIOS.register("future_product")
def future_product(log_ratio: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Σ_{i≥j} λ_i (the "ideal" weight of Bai & Zhang 2026)."""
    return suffix_sum(log_ratio)


@RATIOS.register("prefix_product")
def prefix_product(log_ratio: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Σ_{i≤j} λ_i: per-decision importance sampling (Precup et al. 2000)."""
    return log_ratio.cumsum(1)


@RATIOS.register("prefix_minimum")
def prefix_minimum(log_ratio: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """λ_j + min_{i<j} λ_i, and λ_j at the first own token (MinPRO, Lei et al. 2026)."""
    smallest = torch.where(mask, log_ratio, torch.inf).cummin(1).values.roll(1, 1)
    smallest = torch.cat([torch.full_like(smallest[:, :1], torch.inf), smallest[:, 1:]], 1)
    return log_ratio + torch.where(smallest.isinf(), 0.0, smallest)


@RATIOS.register("clipped_mean")
def clipped_mean(
    log_ratio: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    advantage: Float[Tensor, "N T"],
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, "N T"]:
    """(1/H)·Σ_i of min(λ_i, clip_high) where A_i > 0 and max(λ_i, −clip_low) where A_i < 0, 0 where A_i = 0 (GMPO, Zhao
    et al. 2025, with the weight `ratio` and the path `ratio`)."""
    clipped = torch.where(advantage > 0, log_ratio.clamp(max=clip_high), log_ratio.clamp(min=-clip_low))
    return sequence_mean(masked(clipped, mask & (advantage != 0)), mask)
