"""The standard test instance of the exact lab: one prompt, V symbols, H steps, a random binary reward."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

import torch

from klab.grid import Objective
from klab.harness.exact.drift import drift_size, inner_updates, random_drift
from klab.harness.exact.estimators import couples_trajectories
from klab.harness.exact.report import DEFAULT_SAMPLES, EstimatorReport, report
from klab.harness.exact.tabular import TabularPolicy
from klab.harness.exact.tabular_setting import Setting
from klab.harness.exact.updates import (
    LARGEST_GROUPS,
    Updates,
    count_groups,
    every_group,
    every_trajectory,
    sampled_updates,
)

_FARTHEST = 1024.0
_HALVINGS = 40


@dataclass(frozen=True, eq=False)
class Instance:
    """A random behaviour policy, reference policy and binary reward, determined by a seed.

    The behaviour policy has normal logits of standard deviation 1; the reference adds normal noise of standard
    deviation 0.5 to them. The reward is 1 on a random half of the trajectories.
    """

    vocabulary: int = 3
    horizon: int = 3
    seed: int = 0
    end: int | None = None
    behaviour: TabularPolicy = field(init=False)
    reference: TabularPolicy = field(init=False)
    reward: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        behaviour = TabularPolicy.random(self.vocabulary, self.horizon, generator=generator, end=self.end)
        object.__setattr__(self, "behaviour", behaviour)
        object.__setattr__(self, "reference", behaviour.perturbed(0.5, generator))
        every = len(behaviour.trajectories)
        accepted = torch.randperm(every, generator=generator) < every / 2
        object.__setattr__(self, "reward", accepted.to(torch.float64))

    def referring_to_behaviour(self) -> Instance:
        """The same but for the reference, which is the behaviour policy (`training.reference: rollout`)."""
        other = copy(self)
        object.__setattr__(other, "reference", self.behaviour)
        return other

    def at(self, policy: TabularPolicy) -> Setting:
        """The setting whose current policy is `policy`."""
        return Setting(policy, self.behaviour, self.reference, self.reward)

    def perturbed(self, scale: float) -> Setting:
        """The setting after random drift of standard deviation `scale` (0: on-policy)."""
        return self.at(
            self.behaviour
            if scale == 0.0
            else random_drift(self.behaviour, scale, torch.Generator().manual_seed(self.seed + 1))
        )

    def updated(self, objective: Objective, group_size: int, updates: int) -> list[Setting]:
        """The settings after 1, ..., `updates` inner updates of the cell itself."""
        policies = inner_updates(
            objective, self.behaviour, self.reference, self.reward, group_size, updates,
            generator=torch.Generator().manual_seed(self.seed + 2),
        )  # fmt: skip
        return [self.at(policy) for policy in policies]

    def drifted(self, objective: Objective, group_size: int, updates: int, kl: float) -> Setting:
        """The setting after a drift of a given size in the cell's own direction.

        Args:
            updates: the inner updates of the cell whose way gives the direction.
            kl: KL(behaviour || current) of whole trajectories, nats; the drift is scaled to it.
        """
        target = self.updated(objective, group_size, updates)[-1].policy
        direction = target.logits - self.behaviour.logits
        if kl <= 0 or not direction.any():
            return self.at(self.behaviour)
        low, high = 0.0, 1.0
        while drift_size(self.behaviour, self.behaviour.moved(high * direction)) < kl and high < _FARTHEST:
            low, high = high, 2 * high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            far = drift_size(self.behaviour, self.behaviour.moved(middle * direction)) >= kl
            low, high = (low, middle) if far else (middle, high)
        return self.at(self.behaviour.moved(high * direction))


class SharedUpdates:
    """The updates on which cells are measured, drawn once from one behaviour policy and shared by all cells.

    With common random numbers, differences between cells are far less noisy than the cells' own estimates.

    Args:
        behaviour: the policy that trajectories come from.
        samples: trajectories of each Monte Carlo estimate.
        largest: most multisets of trajectories that are enumerated instead.
        seed: random state of the draws.
    """

    def __init__(
        self, behaviour: TabularPolicy, samples: int = DEFAULT_SAMPLES, largest: int = LARGEST_GROUPS, seed: int = 0
    ) -> None:
        self.behaviour = behaviour
        self.samples = samples
        self.largest = largest
        self.seed = seed
        self._known: dict[int, Updates] = {}

    def updates_for(self, objective: Objective, fixed_length: bool, group_size: int) -> Updates:
        """Enumerated trajectories, enumerated groups or a shared sample of groups, as in `estimator_report`."""
        if not couples_trajectories(objective, fixed_length):
            return self._remembered(0)
        return self._remembered(group_size)

    def _remembered(self, group_size: int) -> Updates:
        if group_size not in self._known:
            self._known[group_size] = self._drawn(group_size)
        return self._known[group_size]

    def _drawn(self, group_size: int) -> Updates:
        if group_size == 0:
            return every_trajectory(self.behaviour)
        if count_groups(len(self.behaviour.trajectories), group_size) <= self.largest:
            return every_group(self.behaviour, group_size)
        generator = torch.Generator().manual_seed(self.seed)
        return sampled_updates(self.behaviour, group_size, max(2, self.samples // group_size), generator)

    def report(self, objective: Objective, setting: Setting, group_size: int) -> EstimatorReport:
        """`estimator_report` over the shared updates."""
        return report(objective, setting, self.updates_for(objective, setting.fixed_length, group_size))
