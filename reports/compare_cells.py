"""Two configurations side by side, for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from klab.grid import UserError
from klab.grid.short_ids import matching_ids
from klab.reports.comparison import Comparison, compare
from klab.reports.config_detail import settings
from klab.reports.figures.series import cube, over_seeds
from klab.reports.schema import RESULTS, TITLES
from klab.reports.statistics import Contrast, Interval, paired_contrast, probability_of_improvement, t_interval
from klab.reports.study import Study


@dataclass(frozen=True)
class Pair:
    """What `klab compare` prints.

    Attributes:
        labels: the two names.
        settings: dotted key and both values, where they differ.
        rows: for each result, its title, both intervals over seeds, and the paired difference second − first.
        seeds: seed, both scores and both states.
        contrast: second − first on the metric, diverged and failed seeds at the worst score.
        improvement: probability that a random seed of the second beats a random seed of the first.
        curves: quantity, both mean curves.
    """

    metric: str
    labels: tuple[str, str]
    settings: list[tuple[str, str, str]]
    rows: list[tuple[str, Interval, Interval, Contrast]]
    seeds: list[tuple[int, float, float, str, str]]
    contrast: Contrast
    improvement: float
    curves: list[tuple[str, list[float], list[float]]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "metric": self.metric,
            "cells": list(self.labels),
            "settings": [{"key": key, "first": first, "second": second} for key, first, second in self.settings],
            "results": [
                {
                    "result": name,
                    "first": first._asdict(),
                    "second": second._asdict(),
                    "difference": difference._asdict(),
                }
                for name, first, second, difference in self.rows
            ],
            "seeds": [{"seed": seed, "first": x, "second": y, "states": [a, b]} for seed, x, y, a, b in self.seeds],
            "difference": self.contrast._asdict(),
            "probability_of_improvement": self.improvement,
        }


def configuration(study: Study, text: str) -> str:
    """The group that `text` means: a cell's or a configuration's id, a part of it, or its name in the report.

    Raises:
        UserError: when nothing, or more than one configuration, is called so.
    """
    pairs = list(zip(study.cells["cell"], study.cells["group"], study.cells["label"], strict=True))
    exact = {group for cell, group, label in pairs if text in (cell, group, label)}
    names = [name for cell, group, _ in pairs for name in (cell, group)]
    fitting = set(matching_ids(text, names))
    found = exact or {group for cell, group, _ in pairs if fitting & {cell, group}}
    if len(found) != 1:
        problem = "no such cell" if not found else f"{len(found)} configurations fit"
        raise UserError(problem, key="cell", value=text, allowed=list(dict.fromkeys(label for _, _, label in pairs)))
    return str(found.pop())


def compare_pair(study: Study, first: str, second: str, metric: str = "reward_final") -> Pair:
    """Two configurations of one task, same seeds against each other.

    Raises:
        UserError: when they belong to different tasks, or the metric does not exist.
    """
    tasks = {str(study.cells.loc[study.cells["group"] == group, "task"].iloc[0]) for group in (first, second)}
    if len(tasks) > 1:
        raise UserError(
            f"the two cells belong to different tasks, {' and '.join(sorted(tasks))}, and cannot be compared",
            key="cell",
        )
    task = tasks.pop()
    main = compare(study, task, metric)
    at = (main.groups.index(first), main.groups.index(second))
    x, y = main.scores[at[0]], main.scores[at[1]]
    both = bool(np.isfinite(x).any() and np.isfinite(y).any())
    chance = probability_of_improvement(y[:, None], x[:, None]) if both else float("nan")
    seeds = [
        (seed, float(x[i]), float(y[i]), main.states[at[0]][i], main.states[at[1]][i])
        for i, seed in enumerate(main.seeds)
        if main.states[at[0]][i] or main.states[at[1]][i]
    ]
    return Pair(
        metric,
        (study.labels[first], study.labels[second]),
        _settings(study, first, second),
        [_row(study, main, at, name) for name in RESULTS if name != "updates"],
        seeds,
        paired_contrast(y, x),
        chance if main.higher else 1 - chance,
        _curves(study, main, at),
    )


def _settings(study: Study, first: str, second: str) -> list[tuple[str, str, str]]:
    left, right = settings(study.configurations[first]), settings(study.configurations[second])
    keys = dict.fromkeys([*left, *right])
    return [
        (key, left.get(key, "–"), right.get(key, "–"))
        for key in keys
        if key != "seed" and left.get(key) != right.get(key)
    ]


def _row(study: Study, main: Comparison, at: tuple[int, int], name: str) -> tuple[str, Interval, Interval, Contrast]:
    def by_seed(group: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        part = study.cells[study.cells["group"] == group].set_index("seed")[name]
        return part.reindex(list(main.seeds)).to_numpy(dtype=np.float64)

    x, y = by_seed(main.groups[at[0]]), by_seed(main.groups[at[1]])
    return TITLES[name], t_interval(x), t_interval(y), paired_contrast(y, x)


def _curves(study: Study, main: Comparison, at: tuple[int, int]) -> list[tuple[str, list[float], list[float]]]:
    found = []
    for frame, column, title in (
        (study.metrics, "reward_mean", "reward"),
        (study.evaluations, "reverse_kl", "KL"),
        (study.metrics, "entropy", "entropy"),
    ):
        data = cube(study, main, frame, column)
        lines = [over_seeds(data.updates, data.values[i]).mean.tolist() for i in at]
        found.append((title, lines[0], lines[1]))
    return found
