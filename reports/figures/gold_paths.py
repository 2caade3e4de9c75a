"""The gold reward, and the proxy that stands for it, along √KL to the reference: one path per configuration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from klab.grid.score import PARTS
from klab.reports.comparison import Comparison
from klab.reports.figures.series import Curve, at_common_updates, cube, mean_curve, root, run_states
from klab.reports.study import Study

GOLD, GAP = f"{PARTS}gold", f"{PARTS}gap"


@dataclass(frozen=True)
class Path:
    """One configuration along training: means over runs at common evaluations.

    Attributes:
        distance, proxy, gold: √KL to the reference, the held-out reward, the gold reward.
        gap: the standardised difference of both; None where it was not recorded.
    """

    group: str
    label: str
    distance: Curve
    proxy: Curve
    gold: Curve
    gap: Curve | None

    @property
    def best(self) -> int:
        """The evaluation with the most gold."""
        return int(self.gold.mean.argmax())

    def gold_at(self, distance: float) -> float:
        """Gold where the path first gets so far; NaN where it never does."""
        reached = np.flatnonzero(self.distance.mean >= distance)
        if not reached.size:
            return np.nan
        after = int(reached[0])
        if after == 0:
            return float(self.gold.mean[0])
        ends = slice(after - 1, after + 1)
        return float(np.interp(distance, self.distance.mean[ends], self.gold.mean[ends]))


def paths(study: Study, comparison: Comparison) -> list[Path]:
    """The paths of all configurations that have one, best by the score first; none where no gold was recorded."""
    columns = ["reverse_kl", "reward", GOLD, *([GAP] if GAP in study.evaluations else [])]
    if not set(columns) <= set(study.evaluations.columns):
        return []
    states = run_states(study, comparison)
    distance, *rewards = (cube(study, comparison, study.evaluations, column) for column in columns)
    found = []
    for group in comparison.table["group"]:
        place = [comparison.groups.index(group)]
        curves = [mean_curve(each, states, place) for each in (root(distance), *rewards)]
        if common := at_common_updates(*curves):
            along, proxy, gold, *gap = common
            found.append(Path(group, study.labels[group], along, proxy, gold, gap[0] if gap else None))
    return found
