"""The importance-ratio axis: log ρ_j from the tokens' log-ratios λ = ℓ − ℓ_old to the behaviour policy.

Every function takes λ, 0 off the own tokens, and the mask of own tokens, and returns log ρ; entries off the own tokens
are ignored. Sums run over own tokens: i ≥ j means the own tokens from j on.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from klab.harness.objective.masking import lengths, suffix_sum
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
