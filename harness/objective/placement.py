"""Placements: where the KL term, β·φ, enters the algorithm.

A placement is a function of its parameters that returns a `Placement`: what is charged to the per-token rewards, to the
normalised advantage, and to the loss. c = 1/H (`kl_scale: mean`) or 1 (`sum`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from klab.harness.objective.masking import last_token_mask, lengths, suffix_sum
from klab.harness.objective.registry import Registry

PLACEMENTS = Registry("placement")

Charge = Callable[[Tensor, Tensor], Tensor]
"""(φ `[N, T]` without gradient and 0 off the own tokens, mask) -> what each own token pays, `[N, T]`."""

LossTerm = Callable[[Tensor, Tensor], Tensor]
"""(φ with gradient, log ρ with gradient) -> what is added to the loss per own token, `[N, T]`."""


@dataclass(frozen=True)
class Placement:
    """Where the KL term enters; a stage that is None is left alone.

    Attributes:
        reward: subtracted from the per-token rewards. The return at token j is the sum of the rewards from j on, so
            that a charge on the last own token lowers r_j for every j.
        advantage: subtracted from the advantage after normalisation.
        loss: added to the loss, aggregated as the surrogate is.
        kl_at: where φ is taken for `reward` and `advantage`: at the behaviour policy ("rollout") or the current one
            ("current").
        relative: the surrogate's ℓ is replaced by κ.
    """

    reward: Charge | None = None
    advantage: Charge | None = None
    loss: LossTerm | None = None
    kl_at: Literal["rollout", "current"] = "rollout"
    log_ratio_surrogate: bool = False


def _scaled(phi: Tensor, mask: Tensor, kl_scale: str) -> Tensor:
    """c·φ."""
    return phi / lengths(mask).clamp(min=1) if kl_scale == "mean" else phi


@PLACEMENTS.register("none")
def no_kl() -> Placement:
    """No KL term."""
    return Placement()


@PLACEMENTS.register("reward")
def kl_in_reward(*, beta: float, kl_scale: str, kl_at: Literal["rollout", "current"]) -> Placement:
    """r_j = R − β·c·Σ_i φ_i for every j (S2 "in reward"; RLOO)."""

    def charge(phi: Tensor, mask: Tensor) -> Tensor:
        total = _scaled(phi.sum(1, keepdim=True), mask, kl_scale)
        return torch.where(last_token_mask(mask), beta * total, 0.0)

    return Placement(reward=charge, kl_at=kl_at)


@PLACEMENTS.register("reward_to_go")
def kl_in_reward_to_go(*, beta: float, kl_scale: str, kl_at: Literal["rollout", "current"]) -> Placement:
    """r_j = R − β·c·Σ_{i≥j} φ_i (S1's token-level reward)."""
    return Placement(reward=lambda phi, mask: beta * _scaled(phi, mask, kl_scale), kl_at=kl_at)


@PLACEMENTS.register("advantage")
def kl_in_advantage(*, beta: float, kl_at: Literal["rollout", "current"]) -> Placement:
    """A_j ← A_j − β·φ_j, after normalisation (S2's combined form)."""
    return Placement(advantage=lambda phi, mask: beta * phi, kl_at=kl_at)


@PLACEMENTS.register("advantage_to_go")
def kl_in_advantage_to_go(*, beta: float, kl_at: Literal["rollout", "current"]) -> Placement:
    """A_j ← A_j − β·Σ_{i≥j} φ_i, after normalisation (OpenRLHF)."""
    return Placement(advantage=lambda phi, mask: beta * suffix_sum(phi), kl_at=kl_at)


@PLACEMENTS.register("loss")
def kl_in_loss(*, beta: float) -> Placement:
    """L += β·agg(φ), differentiated (GRPO)."""
    return Placement(loss=lambda phi, log_rho: beta * phi)


@PLACEMENTS.register("loss_reweighted")
def kl_in_loss_reweighted(*, beta: float) -> Placement:
    """L += β·agg(sg(ρ)·φ)."""
    return Placement(loss=lambda phi, log_rho: beta * (log_rho.detach().exp() * phi))


@PLACEMENTS.register("loss_corrected")
def kl_in_loss_corrected(*, beta: float) -> Placement:
    """L += β·agg(ρ·φ) with ρ differentiated (S3; DeepSeek-V3.2; TRL since 1.16)."""
    return Placement(loss=lambda phi, log_rho: beta * (log_rho.exp() * phi))


@PLACEMENTS.register("reward_and_loss")
def kl_in_reward_and_loss(*, beta: float, kl_scale: str, kl_at: Literal["rollout", "current"]) -> Placement:
    """`reward_to_go` with sg(φ), plus `loss`: with `kl_scale: sum` the exact gradient of E[φ]."""
    inside = kl_in_reward_to_go(beta=beta, kl_scale=kl_scale, kl_at=kl_at)
    return Placement(reward=inside.reward, loss=kl_in_loss(beta=beta).loss, kl_at=kl_at)


@PLACEMENTS.register("log_ratio")
def log_ratio_surrogate() -> Placement:
    """No KL term; ℓ in the surrogate is replaced by κ (S4's "rewarded log-ratio"): the gradient of `none`."""
    return Placement(log_ratio_surrogate=True)
