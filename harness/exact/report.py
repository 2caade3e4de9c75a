"""Quality of a cell's gradient estimator: bias, cosine, variance, effective sample size, mean squared error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from klab.grid import Objective
from klab.harness.exact.estimators import Gradients, couples_trajectories, update_gradients
from klab.harness.exact.tabular import Reward, TabularPolicy
from klab.harness.exact.tabular_setting import Setting
from klab.harness.exact.updates import (
    LARGEST_GROUPS,
    Method,
    Updates,
    count_groups,
    every_group,
    every_trajectory,
    sampled_updates,
)

DEFAULT_SAMPLES = 8_000
"""Trajectories of a Monte Carlo estimate where the caller names no number."""

MSE_TRAJECTORIES = 128
"""Trajectories at which `EstimatorReport.mse` is stated: the rollout of the default training section (16 x 8)."""


@dataclass(frozen=True, eq=False)
class EstimatorReport:
    """Moments of one cell's gradient estimator in one setting.

    Relative numbers are relative to the norm of the true gradient g* (`Setting.truth`), so that cells with different
    aggregations compare. Where gradients overflow, numbers are not finite.

    Attributes:
        bias: |E g - g*| / |g*|; with Monte Carlo the squared length of the noise is subtracted first, never below 0.
        cosine: cosine between E g and g*; 0 where one of them vanishes.
        bias_fitted: the bias left after multiplying E g by the best non-negative scalar, sqrt(1 - max(cosine, 0)^2).
        fitted_scale: that scalar.
        variance: trace of the covariance of the estimator per trajectory: N * trace Cov(gradient of an update of N).
        variance_relative: `variance` / |g*|^2.
        ess: effective sample size of the weights, as a share: (E sum w)^2 / (E H * E sum w^2) over the behaviour's
            tokens.
        mse: (bias^2 + variance / n) of the mean over n = `MSE_TRAJECTORIES` trajectories, relative to |g*|^2.
        standard_error: root mean square error of E g relative to |g*|, 0 when enumerated: `bias` is within a few of it.
        method: `trajectories` or `groups` (enumerated), or `monte carlo`.
        updates: how many updates were enumerated or drawn.
        expectation, truth: E g and g*.
    """

    bias: float
    cosine: float
    bias_fitted: float
    fitted_scale: float
    variance: float
    variance_relative: float
    ess: float
    mse: float
    standard_error: float
    method: Method
    updates: int
    expectation: Float64[Tensor, "contexts V"]
    truth: Float64[Tensor, "contexts V"]

    def mean_squared_error(self, trajectories: int) -> float:
        """bias^2 + variance / n at `trajectories` = n independent trajectories, relative to |g*|^2."""
        return self.bias**2 + self.variance_relative / trajectories

    @property
    def trace_variance(self) -> float:
        """Another name of `variance`."""
        return self.variance

    @property
    def effective_sample_size(self) -> float:
        """Another name of `ess`."""
        return self.ess

    def numbers(self) -> dict[str, float | int | str]:
        """Everything but the two gradients, as plain data."""
        return {name: getattr(self, name) for name in NUMBERS}


NUMBERS = (
    "bias", "cosine", "bias_fitted", "fitted_scale", "variance", "variance_relative", "ess", "mse", "standard_error",
    "method", "updates",
)  # fmt: skip


def estimator_report(
    objective: Objective,
    policy: TabularPolicy,
    behaviour: TabularPolicy,
    reference: TabularPolicy,
    reward: Reward,
    group_size: int,
    samples: int | None = None,
    *,
    groups: int = 1,
    generator: torch.Generator | None = None,
    largest: int = LARGEST_GROUPS,
) -> EstimatorReport:
    """Bias, cosine, variance and effective sample size of a cell's gradient, with samples drawn from `behaviour`.

    Enumerated where that is exact and feasible: over trajectories when the estimator is a mean over independent
    trajectories (advantages `raw`, `positive`, `greedy_baseline`, `gae` with V = 0, without statistics over the
    update), else over all multisets of an update of one group, if there are at most `largest`. Otherwise Monte Carlo.

    Args:
        objective: the cell's objective.
        policy: the current policy, at which the gradient is taken.
        behaviour: the policy that the trajectories come from; pass `policy` for the on-policy case.
        reference: the reference policy of the KL.
        reward: see `tabular.Reward`.
        group_size: trajectories of a group.
        samples: trajectories to draw; naming a number forces Monte Carlo.
        groups: groups of an update, over which batch statistics run.
        generator: random state of Monte Carlo; seeded with 0 when None.
        largest: most multisets to enumerate.
    """
    setting = Setting(policy, behaviour, reference, reward)
    updates = updates_for(objective, setting, group_size, samples, groups=groups, generator=generator, largest=largest)
    return report(objective, setting, updates)


def updates_for(
    objective: Objective,
    setting: Setting,
    group_size: int,
    samples: int | None = None,
    *,
    groups: int = 1,
    generator: torch.Generator | None = None,
    largest: int = LARGEST_GROUPS,
) -> Updates:
    """The updates over which `estimator_report` measures this objective."""
    if group_size < 1 or groups < 1:
        raise ValueError(f"an update has at least one group of one trajectory, got {groups} of {group_size}")
    if samples is None:
        if not couples_trajectories(objective, setting.fixed_length):
            return every_trajectory(setting.behaviour)
        if groups == 1 and count_groups(len(setting.trajectories), group_size) <= largest:
            return every_group(setting.behaviour, group_size)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    count = max(2, (samples or DEFAULT_SAMPLES) // (group_size * groups))
    return sampled_updates(setting.behaviour, group_size, count, generator, groups)


def report(objective: Objective, setting: Setting, updates: Updates) -> EstimatorReport:
    """`estimator_report` over given updates, which several cells may share."""
    found = update_gradients(objective, setting, updates)
    gradients = found.ascent
    truth = setting.truth(objective).flatten()
    mean = updates.weights @ gradients
    centred = gradients - mean
    spread = float(updates.weights @ centred.square().sum(-1))
    noise = 0.0
    if not updates.exact:
        spread *= len(gradients) / (len(gradients) - 1)
        noise = spread / len(gradients)
    length, product = float(truth.norm()), float(mean @ truth)
    missed = _root(float((mean - truth).square().sum()) - noise)
    cosine = (
        float((mean @ truth / (mean.norm() * length)).clamp(-1.0, 1.0)) if length * float(mean.norm()) != 0.0 else 0.0
    )
    bias, variance = _ratio(missed, length), updates.trajectories * spread
    relative = _ratio(variance, length**2)
    return EstimatorReport(
        bias=bias,
        cosine=cosine,
        bias_fitted=1.0 if cosine <= 0.0 else _root(1.0 - cosine**2),
        fitted_scale=0.0 if cosine <= 0.0 else _ratio(product, float(mean.square().sum())),
        variance=variance,
        variance_relative=relative,
        ess=_effective_sample_size(found, updates.weights),
        mse=bias**2 + relative / MSE_TRAJECTORIES,
        standard_error=_ratio(math.sqrt(noise), length),
        method=updates.method,
        updates=len(gradients),
        expectation=mean.view_as(setting.policy.logits),
        truth=truth.view_as(setting.policy.logits),
    )


def _effective_sample_size(found: Gradients, weights: Float64[Tensor, " U"]) -> float:
    weight, square, tokens = (
        float(weights @ sums.to(weights.dtype)) for sums in (found.weight, found.weight_square, found.tokens)
    )
    return weight**2 / (tokens * square) if square > 0 else 0.0


def _root(square: float) -> float:
    """Square root, where rounding below 0 is 0; what is undefined stays so."""
    return 0.0 if square <= 0.0 else math.sqrt(square)


def _ratio(part: float, whole: float) -> float:
    """part / whole, where nothing divided by nothing is 0 and something divided by nothing is infinite."""
    if whole == 0.0:
        return 0.0 if part == 0.0 else math.inf
    return part / whole
