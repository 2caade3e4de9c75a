"""Exact divergences of a tabular policy from its reference, by summation over every trajectory.

Two different things are called the divergence of two language models:

* `token_divergence`: the divergences D(s) of the next token's distributions, summed over the states s that the policy
  itself visits. It is what per-token estimators estimate at samples of the policy, and the truth of a cell.
* `sequence_divergence`: the divergence of the two distributions of whole trajectories. By the chain rule it is the
  former for reverse KL, and for no other divergence here: KL(π_ref‖π) of trajectories adds up KL(π_ref‖π) of tokens at
  the states that the *reference* visits, and α-divergences do not add up.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from klab.harness.exact.tabular import TabularPolicy
from klab.harness.objective.divergence import REVERSE, Divergence

Scale = Literal["sum", "mean"]


def token_divergence(
    policy: TabularPolicy, reference: TabularPolicy, divergence: Divergence = REVERSE, scale: Scale = "sum"
) -> Float64[Tensor, ""]:
    """E_π[c·Σ_j f(δ_j)], in nats; differentiable in the policy's logits.

    Args:
        policy: π, which is differentiated, and which the expectation is under.
        reference: π_ref, over the same trajectories.
        divergence: whose generator is f.
        scale: c is 1 (`sum`), or 1/H of each trajectory (`mean`).
    """
    here = policy.token_logp()
    terms: Tensor = divergence.plain(here - reference.token_logp()).sum(-1)
    if scale == "mean":
        terms = terms / policy.trajectories.lengths
    return (here.sum(-1).exp() * terms).sum()


def sequence_divergence(
    policy: TabularPolicy, reference: TabularPolicy, divergence: Divergence = REVERSE
) -> Float64[Tensor, ""]:
    """E_π[f(Π_j δ_j)], the divergence of the trajectories' distributions; differentiable in the policy's logits."""
    return (policy.probabilities() * divergence.plain(policy.logp() - reference.logp())).sum()


def renyi_divergence(policy: TabularPolicy, reference: TabularPolicy, alpha: float) -> Float64[Tensor, ""]:
    """log(Σ_τ π(τ)^α·π_ref(τ)^{1−α})/(α − 1), the Rényi divergence of the trajectories' distributions, α ≠ 1.

    It has no unbiased estimate from single tokens: f(δ) of one token, averaged over n samples before the logarithm, is
    biased for every n, and for n = 1 it is κ, the estimate of another divergence.
    """
    exponent = alpha * policy.logp() + (1.0 - alpha) * reference.logp()
    return torch.logsumexp(exponent, 0) / (alpha - 1.0)
