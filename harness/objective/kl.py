"""The KL-estimator axis: φ, what one own token contributes to the divergence from the reference policy.

κ = ℓ − ℓ_ref is the log-ratio of the sampled token to the reference, 0 off the own tokens. k1, k2 and k3 are those of
Schulman 2020 ("Approximating KL Divergence"), who writes δ = e^{−κ} as r; formulas here are those of reverse KL, and
what they become for another divergence is the `Divergence` that is passed.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from klab.harness.objective.divergence import REVERSE, Divergence
from klab.harness.objective.registry import Registry

ESTIMATORS = Registry("estimator")


@ESTIMATORS.register("k1")
def k1(log_ratio: Float[Tensor, "*tokens"], divergence: Divergence = REVERSE) -> Float[Tensor, "*tokens"]:
    """κ, or f(δ): unbiased as a value. As a loss the expected gradient of κ is 0 on-policy, and never contains the
    reference."""
    return divergence.plain(log_ratio)


@ESTIMATORS.register("k2")
def k2(log_ratio: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """κ²/2, with the gradient κ·∇ℓ."""
    return 0.5 * log_ratio.square()


@ESTIMATORS.register("k3")
def k3(log_ratio: Float[Tensor, "*tokens"], divergence: Divergence = REVERSE) -> Float[Tensor, "*tokens"]:
    """e^{−κ} − 1 + κ, with the gradient (1 − e^{−κ})·∇ℓ (GRPO, Shao et al. 2024), or f(δ) − f′(1)·(δ − 1)."""
    return divergence.nonnegative(log_ratio)


@ESTIMATORS.register("abs")
def absolute(log_ratio: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """|κ|."""
    return log_ratio.abs()


@ESTIMATORS.register("k3_plus")
def k3_plus(log_ratio: Float[Tensor, "*tokens"], divergence: Divergence = REVERSE) -> Float[Tensor, "*tokens"]:
    """The value of k3 with the gradient of k2 (straight-through, as verl's `k3+`)."""
    straight = k2(log_ratio)
    return k3(log_ratio, divergence).detach() + (straight - straight.detach())


@ESTIMATORS.register("full")
def full(
    log_ratio: Float[Tensor, "N T"],
    divergence: Divergence = REVERSE,
    *,
    logits: Float[Tensor, "N T V"],
    logits_reference: Float[Tensor, "N T V"],
) -> Float[Tensor, "N T"]:
    """Σ_v π(v)·(log π(v) − log π_ref(v)), or D: the exact divergence at each position (Rao-Blackwell; Amini et al.
    2025).

    The gradient runs through `logits`; `log_ratio` is not read. A token that the policy excludes (logit −∞)
    contributes 0.
    """
    return divergence.summand(logits.log_softmax(-1), logits_reference.log_softmax(-1)).sum(-1)


@ESTIMATORS.register("reinforce")
def reinforce(log_ratio: Float[Tensor, "*tokens"], divergence: Divergence = REVERSE) -> Float[Tensor, "*tokens"]:
    """f(δ) − δ·f′(δ) + f′(1): what multiplies ∇ℓ in ∇D, and so what an advantage is charged with (RPG, Zhang et al.
    2025, its REINFORCE-style losses). κ for reverse KL, 1 − e^{−κ} for forward KL."""
    return divergence.coefficient(log_ratio)


def behaviour_kl(log_ratio: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """e^λ − 1 − λ of λ = ℓ − ℓ_old at tokens drawn from π_old: an unbiased estimate ≥ 0 of KL(π_old‖π).

    At a state, E[e^λ] = Σ π_old·π/π_old = 1 and E[−λ] = KL(π_old‖π). The gradient is (e^λ − 1)·∇ℓ, whose expectation
    Σ_v (π − π_old)·∇log π = Σ_v ∇π − Σ_v π_old·∇log π = ∇KL(π_old‖π) is exact, since Σ_v ∇π = 0. The states come from
    π_old whatever π is: summed over a trajectory, it is value and gradient of the KL of trajectories (the chain rule).
    """
    return k3(-log_ratio)


def entropy(logits: Float[Tensor, "*tokens V"]) -> Float[Tensor, "*tokens"]:
    """−Σ_v π(v)·log π(v), in nats, with gradient. A token that the policy excludes (logit −∞) contributes 0."""
    logp = logits.log_softmax(-1)
    probability = logp.exp()
    return -(probability * torch.where(probability > 0, logp, 0.0)).sum(-1)
