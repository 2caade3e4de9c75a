"""The gradient table of a study: every configuration measured on-policy and after several kinds of drift."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klab.grid import Objective
from klab.harness.exact.drift import drift_size
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


@dataclass(frozen=True, slots=True)
class GradientRow:
    """One configuration in one drift setting.

    Attributes:
        group: the configuration (a cell's `group`, or an algorithm's name).
        drift: `on-policy`, `random <std>` or `<k> updates`.
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
        progress: called with (done, all).
    """
    instance = instance or Instance()
    draws = SharedUpdates(instance.behaviour, samples, ENUMERATED_GROUPS, instance.seed)
    fixed = [("on-policy", instance.perturbed(0.0))]
    fixed += [(f"random {scale:g}", instance.perturbed(scale)) for scale in random_drifts]
    known: dict[tuple[Objective, int], list[GradientRow]] = {}
    entries: list[GradientRow] = []
    for done, (group, (objective, size)) in enumerate(configurations.items(), start=1):
        if (objective, size) not in known:
            settings = [*fixed, *_walk(instance, objective, size, inner_updates)]
            known[objective, size] = [
                GradientRow(
                    group,
                    drift,
                    drift_size(instance.behaviour, setting.policy),
                    draws.report(objective, setting, size),
                )
                for drift, setting in settings
            ]
        entries += [GradientRow(group, entry.drift, entry.kl, entry.report) for entry in known[objective, size]]
        if progress is not None:
            progress(done, len(configurations))
    return entries


def _walk(instance: Instance, objective: Objective, size: int, stops: Sequence[int]) -> Iterator[tuple[str, Setting]]:
    if not stops:
        return
    walked = instance.updated(objective, size, max(stops))
    for stop in stops:
        yield f"{stop} updates", walked[stop - 1]
