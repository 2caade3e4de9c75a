"""The gradient table of a study: every configuration measured on-policy and after several kinds of drift."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from klab.grid import Objective
from klab.harness.exact.drift import drift_size
from klab.harness.exact.drift_names import AS_TRAINED, ON_POLICY, inner_updates_name
from klab.harness.exact.instance import Instance, SharedUpdates
from klab.harness.exact.report import DEFAULT_SAMPLES, EstimatorReport
from klab.harness.exact.tabular_setting import Setting

RANDOM_DRIFTS = (0.1, 0.3, 1.0)
"""Standard deviations of the random drifts, as in the book of claims."""

INNER_UPDATES = (4, 16)
"""Numbers of inner updates of the cell itself after which it is measured."""

ENUMERATED_GROUPS = 4_000
"""Most groups (multisets of trajectories) that the table enumerates: groups of 3 at V = H = 3; larger ones are
sampled."""


class Observed(NamedTuple):
    """How far a configuration's policy went from that of its rollouts: the inner updates after the first one that a
    rollout served, and KL(behaviour || current) per token over all updates, nats."""

    updates: int
    kl: float


@dataclass(frozen=True, slots=True)
class GradientRow:
    """One configuration in one drift setting.

    Attributes:
        group: the configuration (a cell's `group`, or an algorithm's name).
        drift: `on-policy`, `random <std>`, `<k> updates`, or `as trained`: as far from the rollout's policy as training
            went.
        kl: KL(behaviour || current) of that drift, in nats.
        report: its estimator there.
    """

    group: str
    drift: str
    kl: float
    report: EstimatorReport

    def row(self) -> dict[str, Any]:
        """Plain data; infinities and undefined numbers become None."""
        numbers = {"group": self.group, "drift": self.drift, "kl": self.kl, **self.report.numbers()}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in numbers.items()
        }


def gradient_table(
    configurations: Mapping[str, tuple[Objective, int]],
    *,
    instance: Instance | None = None,
    random_drifts: Sequence[float] = RANDOM_DRIFTS,
    inner_updates: Sequence[int] = INNER_UPDATES,
    samples: int = DEFAULT_SAMPLES,
    observed: Mapping[str, Observed] | None = None,
    referring_to_behaviour: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[GradientRow]:
    """Measure configurations on-policy, after random drifts and after inner updates of their own.

    All share the instance, the random drifts and the Monte Carlo draws. Configurations with equal objectives and group
    sizes are measured once.

    Args:
        configurations: objective and group size by name.
        instance: policies and reward; `Instance()` when None.
        random_drifts: standard deviations.
        inner_updates: numbers of inner updates, each at least 1.
        samples: trajectories of each Monte Carlo estimate.
        observed: by name, the drift that training showed, which is another setting then.
        referring_to_behaviour: the configurations whose reference is the behaviour policy, for which that is the
            instance's reference, too.
        progress: called with (done, all).
    """
    instance = instance or Instance()
    draws = SharedUpdates(instance.behaviour, samples, ENUMERATED_GROUPS, instance.seed)
    instances = {False: instance, True: instance.referring_to_behaviour()}
    fixed: dict[bool, list[tuple[str, Setting]]] = {}
    for drawn in {group in referring_to_behaviour for group in configurations}:
        fixed[drawn] = [(ON_POLICY, instances[drawn].perturbed(0.0))]
        fixed[drawn] += [(f"random {scale:g}", instances[drawn].perturbed(scale)) for scale in random_drifts]
    known: dict[tuple[Objective, int, Observed | None, bool], list[GradientRow]] = {}
    entries: list[GradientRow] = []
    for done, (group, (objective, size)) in enumerate(configurations.items(), start=1):
        seen, drawn = (observed or {}).get(group), group in referring_to_behaviour
        own, key = instances[drawn], (objective, size, seen, drawn)
        if key not in known:
            settings = [*fixed[drawn], *_walk(own, objective, size, inner_updates)]
            if seen is not None:
                nats = seen.kl * own.horizon
                settings.append((AS_TRAINED, own.drifted(objective, size, seen.updates, nats)))
            known[key] = [
                GradientRow(
                    group,
                    drift,
                    drift_size(instance.behaviour, setting.policy),
                    draws.report(objective, setting, size),
                )
                for drift, setting in settings
            ]
        entries += [GradientRow(group, entry.drift, entry.kl, entry.report) for entry in known[key]]
        if progress is not None:
            progress(done, len(configurations))
    return entries


def _walk(instance: Instance, objective: Objective, size: int, stops: Sequence[int]) -> Iterator[tuple[str, Setting]]:
    if not stops:
        return
    walked = instance.updated(objective, size, max(stops))
    for stop in stops:
        yield inner_updates_name(stop), walked[stop - 1]
