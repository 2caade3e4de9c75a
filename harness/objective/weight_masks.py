"""Weights that leave tokens or trajectories out because the policy has moved too far, by another measure than ρ.

They read λ = ℓ − ℓ_old or the probabilities themselves beside the ratio, which may be any value of that axis.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klab.harness.objective.kl import behaviour_kl
from klab.harness.objective.masking import masked, masked_quantile
from klab.harness.objective.weight import WEIGHTS, ppo_clip


@WEIGHTS.register("two_sided_clip")
def two_sided_clip(
    ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"], *, eps_low: float, eps_high: float, ceiling: float
) -> Float[Tensor, "N T"]:
    """The gradient of min(min(ρ, δ)·A, clip(ρ)·A), δ = `ceiling` (INTELLECT-2, Prime Intellect 2025): `ppo_clip`, and
    0 above δ; where A < 0 and δ < 1 + ε_high, only above 1 + ε_high."""
    top = torch.where(advantage < 0, max(ceiling, 1 + eps_high), ceiling)
    return torch.where(ratio <= top, ppo_clip(ratio, advantage, eps_low=eps_low, eps_high=eps_high), 0.0)


@WEIGHTS.register("dppo_tv")
def dppo_tv(
    ratio: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"],
    *,
    logp: Float[Tensor, "N T"],
    logp_behaviour: Float[Tensor, "N T"],
    tv_low: float,
    tv_high: float,
    truncation: float,
) -> Float[Tensor, "N T"]:
    """min(ρ, truncation), and 0 where the probability of the token has moved further in the direction of A than the
    total variation allows: π − π_old > tv_high where A > 0, π − π_old < −tv_low elsewhere (DPPO, Qi et al. 2026)."""
    moved = logp.exp() - logp_behaviour.exp()
    kept = torch.where(advantage > 0, moved <= tv_high, moved >= -tv_low)
    return torch.where(kept, ratio.clamp(max=truncation), 0.0)


@WEIGHTS.register("dppo_kl")
def dppo_kl(
    ratio: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"],
    *,
    logp: Float[Tensor, "N T"],
    logp_behaviour: Float[Tensor, "N T"],
    kl_low: float,
    kl_high: float,
    truncation: float,
) -> Float[Tensor, "N T"]:
    """`dppo_tv` with the KL divergence of the binary distributions (token, any other) in the place of the total
    variation: p_old·log(p_old/p) + (1 − p_old)·log((1 − p_old)/(1 − p)) (DPPO, Qi et al. 2026).

    As in verl 1e-8 is added to the probabilities of any other token.
    """
    p, old = logp.exp(), logp_behaviour.exp()
    other, other_old = (1 - p).clamp(min=0), (1 - old).clamp(min=0)  # log-probabilities above 0 are rounding
    divergence = old * (logp_behaviour - logp) + other_old * ((other_old + 1e-8) / (other + 1e-8)).log()
    kept = torch.where(
        advantage > 0, (divergence <= kl_high) | (logp <= logp_behaviour), (divergence <= kl_low) | (p >= old)
    )
    return torch.where(kept, ratio.clamp(max=truncation), 0.0)


@WEIGHTS.register("sequence_kl_mask")
def sequence_kl_mask(
    ratio: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"],
    *,
    log_ratio: Float[Tensor, "N T"],
    lengths: Int[Tensor, "N 1"],
    eps_low: float,
    eps_high: float,
    drift: float,
) -> Float[Tensor, "N T"]:
    """`ppo_clip`, and 0 where A < 0 in trajectories whose mean of −λ exceeds `drift` (off-policy sequence masking,
    DeepSeek-AI 2025b)."""
    mean_kl = -log_ratio.sum(1, keepdim=True) / lengths.clamp(min=1)
    clipped = ppo_clip(ratio, advantage, eps_low=eps_low, eps_high=eps_high)
    return torch.where((advantage < 0) & (mean_kl > drift), 0.0, clipped)


@WEIGHTS.register("sequence_max_mask")
def sequence_max_mask(
    ratio: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"],
    *,
    log_ratio: Float[Tensor, "N T"],
    worst: float,
) -> Float[Tensor, "N T"]:
    """ρ, and 0 in trajectories with a token whose e^λ − 1 − λ exceeds `worst` (trust region masking, Li et al.
    2025)."""
    return torch.where(behaviour_kl(log_ratio).amax(1, keepdim=True) <= worst, ratio, 0.0)


@WEIGHTS.register("second_moment_mask")
def second_moment_mask(
    ratio: Float[Tensor, "N T"], advantage: Float[Tensor, "N T"], *, kept: Bool[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """ρ at the tokens that `second_moment_tokens` keeps, else 0 (M2PO, Zheng et al. 2025c)."""
    return torch.where(kept, ratio, 0.0)


def second_moment_tokens(
    log_rho: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    advantage: Float[Tensor, "N T"],
    moment: float,
) -> dict[str, Bool[Tensor, "N T"]]:
    """Algorithm 1 of Zheng et al. 2025c: among the tokens on which PPO could clip (A > 0 and ρ > 1, A < 0 and ρ < 1),
    those with the largest (log ρ)² are left out until the mean of (log ρ)² over the others is at most `moment`.

    Equal ones are left out in the order of the tokens from the end.

    Returns:
        {"kept": whether each token keeps its weight}.
    """
    counted = mask & (log_rho * advantage > 0)
    square = torch.where(counted, log_rho.double().square(), torch.inf).flatten()
    order = square.argsort(stable=True)
    number = torch.arange(1, square.numel() + 1, device=square.device)
    within = square[order].cumsum(0) <= moment * number
    kept = torch.zeros_like(within).scatter(0, order, within).view_as(mask)
    return {"kept": kept | ~counted}


@WEIGHTS.register("log_clip")
def log_clip(
    ratio: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"],
    *,
    positions: Int[Tensor, "N T"],
    log_low: float,
    log_high: float,
    log_ceiling: float,
    growth: float,
) -> Float[Tensor, "N T"]:
    """ρ, and 0 where A > 0 and log ρ > log_high·s, or A < 0 and log ρ is outside [−log_low·s, log_ceiling·s], with
    s = t^growth at the t-th own token (CTPO, Zhang et al. 2026)."""
    scale = (positions + 1).to(ratio.dtype) ** growth
    log_rho = ratio.log()
    above = log_rho > torch.where(advantage > 0, log_high, log_ceiling) * scale
    below = (advantage < 0) & (log_rho < -log_low * scale)
    return torch.where((above & (advantage != 0)) | below, 0.0, ratio)


@WEIGHTS.register("cppo_tv")
def cppo_tv(
    ratio: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"],
    *,
    logp: Float[Tensor, "N T"],
    logp_behaviour: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    tv_limit: float,
    least_weight: float,
    budget: float,
) -> Float[Tensor, "N T"]:
    """ρ, and 0 at tokens that move on (A·(ρ − 1) > 0) and have moved too far for their position or after their prefix
    (CPPO, Mao et al. 2026, equations 8 to 11 and 22, in its form with the total variation of the sampled token)."""
    moved = masked((logp.exp() - logp_behaviour.exp()).abs(), mask)
    count = mask.sum(1, keepdim=True)
    place = (mask.cumsum(1) - 1).to(moved.dtype)
    share = masked(1 - (1 - least_weight) * place / (count - 1).clamp(min=1), mask)
    weighed = share * moved
    mean = masked_quantile(moved, mask, 0.9).clamp(min=budget, max=2 * budget)
    before = mean * (share.cumsum(1) - share) - (weighed.cumsum(1) - weighed)
    within = weighed <= (tv_limit + before).clamp(max=tv_limit)
    return torch.where((advantage * (ratio - 1) <= 0) | within, ratio, 0.0)


@WEIGHTS.register("tv_band")
def tv_band(
    ratio: Float[Tensor, "N T"],
    advantage: Float[Tensor, "N T"],
    *,
    logp: Float[Tensor, "N T"],
    logp_behaviour: Float[Tensor, "N T"],
    band: float,
    band_penalty: float,
) -> Float[Tensor, "N T"]:
    """ρ where the token's probability has moved by `band` at most, else 0 (prime-rl's ipo, whose penalty
    band_penalty·λ² is in `covariance.PENALTIES`)."""
    return torch.where((logp.exp() - logp_behaviour.exp()).abs() <= band, ratio, 0.0)
