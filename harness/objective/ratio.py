"""Importance ratios: log ρ_j from the tokens' log-ratios λ = ℓ − ℓ_old to the behaviour policy.

Every function takes λ `[N, T]`, 0 off the own tokens, and the mask of own tokens, and returns log ρ `[N, T]`; entries
off the own tokens are ignored. Sums run over own tokens: i ≥ j means the own tokens from j on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klab.harness.objective.masking import lengths, suffix_sum
from klab.harness.objective.registry import Registry

RATIOS = Registry("ratio", "log_ratio", "mask")


@RATIOS.register("none")
def no_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """0: no correction."""
    return torch.zeros_like(log_ratio)


@RATIOS.register("token")
def token(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """λ_j (PPO, GRPO)."""
    return log_ratio


@RATIOS.register("sequence_mean")
def sequence_mean(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """(1/H)·Σ_i λ_i: the geometric mean over the trajectory (GSPO)."""
    return (log_ratio.sum(1, keepdim=True) / lengths(mask).clamp(min=1)).expand_as(log_ratio)


@RATIOS.register("future_mean")
def future_mean(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """(1/(H−j+1))·Σ_{i≥j} λ_i: the geometric mean over the tokens still to come (S1)."""
    return suffix_sum(log_ratio) / suffix_sum(mask).clamp(min=1)


@RATIOS.register("sequence_product")
def sequence_product(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Σ_i λ_i: exact importance sampling of the trajectory (RLOO in TRL)."""
    return log_ratio.sum(1, keepdim=True).expand_as(log_ratio)


@RATIOS.register("future_product")
def future_product(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Σ_{i≥j} λ_i (S1's "ideal" weight)."""
    return suffix_sum(log_ratio)


@RATIOS.register("prefix_product")
def prefix_product(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Σ_{i≤j} λ_i: per-decision importance sampling (Precup et al. 2000)."""
    return log_ratio.cumsum(1)
