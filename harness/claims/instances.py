"""The policies on which claims are decided, and sums over everything that they can do.

Bandits are one-step policies. Sequences are tabular policies over V symbols and horizon H. All numbers are float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from klab.harness.exact.tabular import TabularPolicy

CATEGORICAL = (0.4, 0.3, 0.2, 0.1)
"""The worked categorical policy; its reference is the same numbers in reverse order."""

BERNOULLI = (0.8, 0.2)
"""The worked Bernoulli policy; its reference is (0.5, 0.5)."""


def bandit(probabilities: tuple[float, ...]) -> TabularPolicy:
    """A one-step policy with these probabilities."""
    return TabularPolicy(torch.tensor([probabilities], dtype=torch.float64).log())


def generator(seed: int) -> torch.Generator:
    """A fresh random generator."""
    return torch.Generator().manual_seed(seed)


def binary_reward(trajectories: int, seed: int) -> Tensor:
    """A random 0/1 reward of each trajectory, float64 `[M]`, not constant."""
    reward = (torch.rand(trajectories, generator=generator(seed)) < 0.5).to(torch.float64)
    reward[0], reward[1] = 0.0, 1.0
    return reward


@dataclass(frozen=True)
class Setting:
    """A current policy, the policy that produced the data, and the reference, all over the same M trajectories.

    Attributes:
        policy: pi.
        behaviour: old.
        reference: ref.
    """

    policy: TabularPolicy
    reference: TabularPolicy
    behaviour: TabularPolicy

    @classmethod
    def random(
        cls, vocabulary: int, horizon: int, seed: int, *, drift: float = 0.0, scale: float = 1.0, end: int | None = None
    ) -> Setting:
        """Random policies; `drift` is the standard deviation of the logit noise from behaviour to current policy."""
        source = generator(seed)
        behaviour = TabularPolicy.random(vocabulary, horizon, scale=scale, generator=source, end=end)
        reference = TabularPolicy.random(vocabulary, horizon, scale=scale, generator=source, end=end)
        policy = behaviour.perturbed(drift, source) if drift else behaviour
        return cls(policy, reference, behaviour)

    @classmethod
    def on_policy(cls, policy: TabularPolicy, reference: TabularPolicy) -> Setting:
        """Data from the current policy itself."""
        return cls(policy, reference, policy)

    @cached_property
    def mask(self) -> Tensor:
        """Own tokens, float64 `[M, H]`."""
        return self.policy.trajectories.mask.to(torch.float64)

    @cached_property
    def lengths(self) -> Tensor:
        """Own tokens of each trajectory, float64 `[M]`."""
        return self.mask.sum(1)

    @cached_property
    def probabilities(self) -> Tensor:
        """pi(tau), `[M]`."""
        return self.policy.probabilities().detach()

    @cached_property
    def sampling(self) -> Tensor:
        """old(tau), `[M]`."""
        return self.behaviour.probabilities().detach()

    @cached_property
    def kappa(self) -> Tensor:
        """log pi/ref of each own token, `[M, H]`: the k1 estimator."""
        return (self.policy.token_logp() - self.reference.token_logp()).detach()

    @cached_property
    def log_ratio(self) -> Tensor:
        """log pi/old of each own token, `[M, H]`."""
        return (self.policy.token_logp() - self.behaviour.token_logp()).detach()

    @cached_property
    def scores(self) -> Tensor:
        """grad log pi of each own token with respect to the logits, `[M, H, D]`."""
        return self.policy.token_scores()

    def samples(self, coefficient: Tensor) -> Tensor:
        """One gradient per trajectory: sum over its tokens of coefficient `[M, H]` times the score; `[M, D]`."""
        return torch.einsum("mh,mhd->md", coefficient * self.mask, self.scores)

    def mean(self, coefficient: Tensor) -> Tensor:
        """Expectation under the behaviour policy of `samples(coefficient)`, `[D]`."""
        return torch.einsum("mh,mhd->d", coefficient * self.mask * self.sampling[:, None], self.scores)

    def spread(self, coefficient: Tensor) -> float:
        """Trace of the covariance of `samples(coefficient)` under the behaviour policy."""
        return trace_variance(self.sampling, self.samples(coefficient))


def to_go(values: Tensor) -> Tensor:
    """Sum of each token's and all later tokens' values, `[M, H]`."""
    return values.flip(1).cumsum(1).flip(1)


def trace_variance(probabilities: Tensor, vectors: Tensor) -> float:
    """Trace of the covariance of `vectors [M, D]` under `probabilities [M]`."""
    centred = vectors - probabilities @ vectors
    return float(probabilities @ centred.square().sum(1))


def variance(probabilities: Tensor, values: Tensor) -> float:
    """Variance of `values [M]` under `probabilities [M]`."""
    mean = (probabilities * values).sum()
    return float((probabilities * (values - mean) ** 2).sum())


def relative(estimate: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((estimate.flatten() - truth.flatten()).norm() / truth.norm())


def cosine(left: Tensor, right: Tensor) -> float:
    """Cosine of the angle between two gradients."""
    return float(left.flatten() @ right.flatten() / (left.norm() * right.norm()))


def k3(kappa: Tensor) -> Tensor:
    """The k3 estimator of kappa = log pi/ref."""
    return torch.expm1(-kappa) + kappa


def normal_expectation(values: np.ndarray, points: np.ndarray) -> float:
    """Expectation under the standard normal of a function known on a uniform grid (the trapezoid rule is spectral
    here)."""
    density = np.exp(-0.5 * points**2) / np.sqrt(2 * np.pi)
    return float(np.sum(values * density) * (points[1] - points[0]))


def normal_grid(reach: float = 14.0, count: int = 28001) -> np.ndarray:
    """Points of a uniform grid for `normal_expectation`."""
    return np.linspace(-reach, reach, count)
