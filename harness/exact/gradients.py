"""Expected reward, KL and entropy of a tabular policy and their gradients, by summation over every trajectory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from klab.harness.exact.tabular import Reward, TabularPolicy

Direction = Literal["reverse", "forward"]
Scale = Literal["sum", "mean"]


def expected_reward(policy: TabularPolicy, reward: Reward) -> Float64[Tensor, ""]:
    """E_pi[R]; differentiable in the policy's logits."""
    return (policy.probabilities() * policy.reward_of(reward)).sum()


def exact_kl(
    policy: TabularPolicy, reference: TabularPolicy, direction: Direction = "reverse", scale: Scale = "sum"
) -> Float64[Tensor, ""]:
    """KL divergence between the trajectory distributions, in nats; differentiable in both policies' logits.

    Args:
        policy: pi.
        reference: the reference policy, with the same vocabulary, horizon and end symbol.
        direction: `reverse` is KL(pi || reference), `forward` is KL(reference || pi).
        scale: `sum` adds the log-ratios of a trajectory's tokens; `mean` averages them over its own length H(tau)
            before the expectation, E[(1/H) sum_j log-ratio_j]. With an end symbol the length is random and the two
            differ by more than a constant.

    Raises:
        ValueError: policies over different trajectories, or an unknown direction or scale.
    """
    _same_trajectories(policy, reference)
    here, there = policy.token_logp(), reference.token_logp()
    if direction == "forward":
        here, there = there, here
    elif direction != "reverse":
        raise ValueError(f"direction is reverse or forward, not {direction!r}")
    log_ratio = (here - there).sum(-1)
    if scale == "mean":
        log_ratio = log_ratio / policy.trajectories.lengths
    elif scale != "sum":
        raise ValueError(f"scale is sum or mean, not {scale!r}")
    return (here.sum(-1).exp() * log_ratio).sum()


def exact_entropy(policy: TabularPolicy, scale: Scale = "sum") -> Float64[Tensor, ""]:
    """Entropy of the trajectory distribution in nats (`sum`), or E[-(1/H) log pi(tau)] (`mean`); differentiable."""
    surprise = -policy.logp()
    if scale == "mean":
        surprise = surprise / policy.trajectories.lengths
    elif scale != "sum":
        raise ValueError(f"scale is sum or mean, not {scale!r}")
    return (policy.probabilities() * surprise).sum()


def gradient_of(
    policy: TabularPolicy, value: Callable[[TabularPolicy], Float64[Tensor, ""]]
) -> Float64[Tensor, "contexts V"]:
    """Gradient of `value(policy)` with respect to the logits, detached.

    Example:
        >>> gradient_of(TabularPolicy(torch.zeros(1, 2)), exact_entropy)
        tensor([[0., 0.]], dtype=torch.float64)
    """
    logits = policy.logits.detach().clone().requires_grad_()
    with torch.enable_grad():
        result = value(TabularPolicy(logits, policy.end))
        (gradient,) = torch.autograd.grad(result, logits)
    return gradient


def exact_gradient(
    policy: TabularPolicy,
    reference: TabularPolicy,
    reward: Reward,
    beta: float,
    kl: Direction = "reverse",
    scale: Scale = "sum",
) -> Float64[Tensor, "contexts V"]:
    """The exact gradient of E_pi[R] - beta * KL with respect to the policy's logits.

    Args:
        policy: pi, the policy that is differentiated (and that the expectation is under).
        reference: the reference policy; its logits are constants.
        reward: see `tabular.Reward`.
        beta: the coefficient; 0 gives the gradient of the expected reward.
        kl: `reverse` KL(pi || reference) or `forward` KL(reference || pi).
        scale: `sum` over tokens or per-token `mean`, as in `exact_kl`.
    """

    def value(moving: TabularPolicy) -> Tensor:
        total = expected_reward(moving, reward)
        return total - beta * exact_kl(moving, reference, kl, scale) if beta else total

    return gradient_of(policy, value)


def _same_trajectories(policy: TabularPolicy, other: TabularPolicy) -> None:
    if policy.logits.shape != other.logits.shape or policy.end != other.end:
        raise ValueError(
            f"policies over different trajectories: {list(policy.logits.shape)} with end {policy.end} "
            f"and {list(other.logits.shape)} with end {other.end}"
        )
