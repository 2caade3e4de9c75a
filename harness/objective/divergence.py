"""The divergence axis: which divergence of π from π_ref the KL term is, as the functions that estimators read.

A divergence D(s) = Σ_v π(v)·f(δ_v) of the next token's distributions at a state s has a convex generator f of
δ = π_ref/π with f(1) = 0; all built-in ones have f″(1) = 1, so that they agree to second order and β means the same.
At tokens drawn from π, f(δ) is an unbiased estimate of D, and so is f(δ) − f′(1)·(δ − 1), which is never negative and
is the divergence of measures that need not sum to 1 (the unnormalised KLs of Zhang et al. 2025, RPG).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from klab.harness.objective.registry import Registry

DIVERGENCES = Registry("divergence")


@dataclass(frozen=True)
class Divergence:
    """One divergence; every function is differentiable, of tensors of any shape, and 0 where π = π_ref.

    Attributes:
        plain: of κ = −log δ: f(δ).
        nonnegative: of κ: f(δ) − f′(1)·(δ − 1).
        coefficient: of κ: f(δ) − δ·f′(δ) + f′(1). As E_π[∇f(δ)] = −E_π[δ·f′(δ)·∇ℓ], this times ∇ℓ has the expectation
            ∇D(s), whatever constant is added.
        summand: of log π(v) and log π_ref(v): terms that add up to D(s) over all symbols v.
    """

    plain: Callable[[Tensor], Tensor]
    nonnegative: Callable[[Tensor], Tensor]
    coefficient: Callable[[Tensor], Tensor]
    summand: Callable[[Tensor, Tensor], Tensor]


def _reverse_summand(logp: Tensor, logp_reference: Tensor) -> Tensor:
    """π·(log π − log π_ref), 0 where π is."""
    probability = logp.exp()
    return probability * torch.where(probability > 0, logp - logp_reference, 0.0)


def _forward_summand(logp: Tensor, logp_reference: Tensor) -> Tensor:
    """π_ref·(log π_ref − log π), 0 where π_ref is."""
    probability = logp_reference.exp()
    return torch.where(probability > 0, probability * (logp_reference - logp), 0.0)


REVERSE = Divergence(
    plain=lambda kappa: kappa,
    nonnegative=lambda kappa: torch.expm1(-kappa) + kappa,
    coefficient=lambda kappa: kappa,
    summand=_reverse_summand,
)
"""KL(π‖π_ref)."""

FORWARD = Divergence(
    plain=lambda kappa: -kappa * torch.exp(-kappa),
    nonnegative=lambda kappa: -torch.expm1(-kappa) - kappa * torch.exp(-kappa),
    coefficient=lambda kappa: -torch.expm1(-kappa),
    summand=_forward_summand,
)
"""KL(π_ref‖π)."""


@DIVERGENCES.register("reverse")
def reverse() -> Divergence:
    """KL(π‖π_ref), f(δ) = −log δ: `k1` is κ, `k3` is e^{−κ} − 1 + κ."""
    return REVERSE


@DIVERGENCES.register("forward")
def forward() -> Divergence:
    """KL(π_ref‖π) of the next token, f(δ) = δ·log δ: RPG's FKL (`k1`) and UFKL (`k3`) over π/π_old."""
    return FORWARD


@DIVERGENCES.register("jeffreys")
def jeffreys() -> Divergence:
    """½·(KL(π‖π_ref) + KL(π_ref‖π)), f(δ) = ½·(δ − 1)·log δ."""

    def product(kappa: Tensor) -> Tensor:
        return -0.5 * kappa * torch.expm1(-kappa)

    return Divergence(
        plain=product,
        nonnegative=product,
        coefficient=lambda kappa: 0.5 * (kappa - torch.expm1(-kappa)),
        summand=lambda logp, reference: 0.5 * (_reverse_summand(logp, reference) + _forward_summand(logp, reference)),
    )


@DIVERGENCES.register("alpha")
def power(*, alpha: float) -> Divergence:
    """(Σ_v π^α·π_ref^{1−α} − 1)/(α·(α − 1)), f(δ) = (δ^{1−α} − 1)/(α·(α − 1)) (Cressie & Read 1984)."""
    if alpha == 1.0:
        return REVERSE
    scale = 1.0 / (alpha * (alpha - 1.0))

    def plain(kappa: Tensor) -> Tensor:
        return scale * torch.expm1((alpha - 1.0) * kappa)

    def summand(logp: Tensor, logp_reference: Tensor) -> Tensor:
        inside = logp > -torch.inf
        exponent = alpha * torch.where(inside, logp, 0.0) + (1.0 - alpha) * logp_reference
        mixed = torch.where(inside, exponent.exp(), 0.0)
        return scale * (mixed - alpha * logp.exp() - (1.0 - alpha) * logp_reference.exp())

    return Divergence(
        plain=plain,
        nonnegative=lambda kappa: plain(kappa) + torch.expm1(-kappa) / alpha,
        coefficient=lambda kappa: torch.expm1((alpha - 1.0) * kappa) / (alpha - 1.0),
        summand=summand,
    )
