"""Drift between behaviour and current policy: random perturbation, or several updates of the cell on one rollout."""

from __future__ import annotations

import torch

from klab.grid import Objective
from klab.harness.exact.estimators import update_gradients
from klab.harness.exact.gradients import exact_kl
from klab.harness.exact.tabular import Reward, TabularPolicy
from klab.harness.exact.tabular_setting import Setting
from klab.harness.exact.updates import sampled_updates

STEP = 0.1
"""Length of one inner update in logit space: the same for every cell, whatever the scale of its gradient."""

ROLLOUT_GROUPS = 16
"""Groups of the one rollout that the inner updates reuse."""


def inner_updates(
    objective: Objective,
    behaviour: TabularPolicy,
    reference: TabularPolicy,
    reward: Reward,
    group_size: int,
    updates: int,
    *,
    groups: int = ROLLOUT_GROUPS,
    step: float = STEP,
    generator: torch.Generator | None = None,
) -> list[TabularPolicy]:
    """The policies after 1, 2, ..., `updates` inner updates of the cell on one rollout of the behaviour policy.

    The rollout of `groups` groups is sampled once and reused, as in training; each update moves the logits by `step`
    along the cell's gradient at the current policy. A gradient that vanishes or is not finite leaves the policy where
    it is.

    Args:
        objective: the cell's objective.
        behaviour: the policy that the rollout is drawn from, and the first policy.
        reference: the reference policy of the KL.
        reward: see `tabular.Reward`.
        group_size: trajectories of a group.
        updates: number of inner updates.
        groups: groups of the rollout.
        step: length of each step in logit space.
        generator: random state of the rollout; seeded with 0 when None, so that cells share their random numbers.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    rollout = sampled_updates(behaviour, group_size, 1, generator, groups)
    policies = [behaviour]
    for _ in range(updates):
        setting = Setting(policies[-1], behaviour, reference, reward)
        direction = update_gradients(objective, setting, rollout).ascent[0]
        length = direction.norm()
        if not torch.isfinite(length) or length == 0:
            policies.append(policies[-1])
            continue
        policies.append(policies[-1].moved((step / length * direction).view_as(behaviour.logits)))
    return policies[1:]


def random_drift(behaviour: TabularPolicy, scale: float, generator: torch.Generator | None = None) -> TabularPolicy:
    """The behaviour policy with normal noise of standard deviation `scale` on every logit, as a current policy."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return behaviour.perturbed(scale, generator)


def drift_size(behaviour: TabularPolicy, policy: TabularPolicy) -> float:
    """KL(behaviour || policy) of whole trajectories, in nats."""
    return float(exact_kl(policy, behaviour, "forward"))
