"""The placement axis: where the KL term β·φ enters the algorithm.

A placement is a factory: from its parameters it makes a `Placement`, which says what is subtracted from the per-token
rewards and from the normalised advantage, and what is added to the loss. c = 1/H (`kl_scale: mean`) or 1 (`sum`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from klab.harness.objective.masking import last_token_mask, lengths, suffix_sum
from klab.harness.objective.registry import Registry

PLACEMENTS = Registry("placement")

KlAt = Literal["rollout", "current"]

Penalty = Callable[[Float[Tensor, "N T"], Bool[Tensor, "N T"]], Float[Tensor, "N T"]]
"""(φ without gradient and 0 off the own tokens, mask of own tokens) -> what each own token is charged."""

LossTerm = Callable[[Float[Tensor, "N T"], Float[Tensor, "N T"]], Float[Tensor, "N T"]]
"""(φ with gradient, log ρ with gradient) -> what each own token adds to the loss."""


@dataclass(frozen=True)
class Placement:
    """Where the KL term enters; a stage that is None is left alone.

    Attributes:
        reward: subtracted from the per-token rewards. The return at token j is the sum of the rewards from j on, so
            that a penalty on the last own token lowers r_j for every j.
        advantage: subtracted from the advantage after normalisation.
        loss: added to the loss, aggregated as the surrogate is.
        kl_at: whose log-probabilities φ uses in `reward` and `advantage`: the behaviour policy's ("rollout") or the
            current policy's ("current").
        log_ratio_surrogate: the surrogate is w·A·κ instead of w·A·ℓ.
    """

    reward: Penalty | None = None
    advantage: Penalty | None = None
    loss: LossTerm | None = None
    kl_at: KlAt = "rollout"
    log_ratio_surrogate: bool = False

    @property
    def has_kl(self) -> bool:
        """Whether some stage has a KL term, so that the estimator is evaluated."""
        return not (self.reward is None and self.advantage is None and self.loss is None)


def _scaled(phi: Float[Tensor, "N k"], mask: Bool[Tensor, "N T"], kl_scale: str) -> Float[Tensor, "N k"]:
    """c·φ."""
    return phi / lengths(mask).clamp(min=1) if kl_scale == "mean" else phi


@PLACEMENTS.register("none")
def no_kl() -> Placement:
    """No KL term."""
    return Placement()


@PLACEMENTS.register("reward")
def kl_in_reward(*, beta: float, kl_scale: str, kl_at: KlAt) -> Placement:
    """r_j = R − β·c·Σ_i φ_i for every j (RLOO, Ahmadian et al. 2024)."""

    def penalty(phi: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
        total = _scaled(phi.sum(1, keepdim=True), mask, kl_scale)
        return torch.where(last_token_mask(mask), beta * total, 0.0)

    return Placement(reward=penalty, kl_at=kl_at)


@PLACEMENTS.register("reward_to_go")
def kl_in_reward_to_go(*, beta: float, kl_scale: str, kl_at: KlAt) -> Placement:
    """r_j = R − β·c·Σ_{i≥j} φ_i (Ouyang et al. 2022; the token-level reward of Bai & Zhang 2026)."""
    return Placement(reward=lambda phi, mask: beta * _scaled(phi, mask, kl_scale), kl_at=kl_at)


@PLACEMENTS.register("advantage")
def kl_in_advantage(*, beta: float, kl_at: KlAt) -> Placement:
    """A_j ← A_j − β·φ_j, after normalisation (From Estimation to Optimization, its combined form)."""
    return Placement(advantage=lambda phi, mask: beta * phi, kl_at=kl_at)


@PLACEMENTS.register("advantage_to_go")
def kl_in_advantage_to_go(*, beta: float, kl_at: KlAt) -> Placement:
    """A_j ← A_j − β·Σ_{i≥j} φ_i, after normalisation (OpenRLHF)."""
    return Placement(advantage=lambda phi, mask: beta * suffix_sum(phi), kl_at=kl_at)


@PLACEMENTS.register("loss")
def kl_in_loss(*, beta: float) -> Placement:
    """L += β·agg(φ), differentiated (GRPO, Shao et al. 2024)."""
    return Placement(loss=lambda phi, log_rho: beta * phi)


@PLACEMENTS.register("loss_reweighted")
def kl_in_loss_reweighted(*, beta: float) -> Placement:
    """L += β·agg(sg(ρ)·φ)."""
    return Placement(loss=lambda phi, log_rho: beta * (log_rho.detach().exp() * phi))


@PLACEMENTS.register("loss_corrected")
def kl_in_loss_corrected(*, beta: float) -> Placement:
    """L += β·agg(ρ·φ), ρ differentiated (Jiosi 2026; DeepSeek-V3.2, DeepSeek-AI 2025b; TRL since 1.16)."""
    return Placement(loss=lambda phi, log_rho: beta * (log_rho.exp() * phi))


@PLACEMENTS.register("reward_and_loss")
def kl_in_reward_and_loss(*, beta: float, kl_scale: str, kl_at: KlAt) -> Placement:
    """`reward_to_go` with sg(φ), plus `loss`: with `kl_scale: sum` the exact gradient of E[φ] (Shah et al. 2025)."""
    inside = kl_in_reward_to_go(beta=beta, kl_scale=kl_scale, kl_at=kl_at)
    return Placement(reward=inside.reward, loss=kl_in_loss(beta=beta).loss, kl_at=kl_at)


@PLACEMENTS.register("advantage_and_loss")
def kl_in_advantage_and_loss(*, beta: float, kl_at: KlAt) -> Placement:
    """`advantage_to_go` with sg(φ), plus `loss`: the gradient of E[φ] that no normalisation of the reward rescales
    (Yao et al. 2026a, theorem 4.1)."""
    after = kl_in_advantage_to_go(beta=beta, kl_at=kl_at)
    return Placement(advantage=after.advantage, loss=kl_in_loss(beta=beta).loss, kl_at=kl_at)


@PLACEMENTS.register("log_ratio")
def log_ratio_surrogate() -> Placement:
    """No KL term; ℓ in the surrogate is replaced by κ (GRPO and Log-Ratio-Based Regularization). The gradient is that
    of `none`, since ℓ_ref is a constant."""
    return Placement(log_ratio_surrogate=True)
