"""Two configurations side by side, for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from klab.grid import UserError
from klab.grid.score import RESULTS
from klab.grid.short_ids import matching_ids
from klab.reports.comparison import Comparison, compare
from klab.reports.config_detail import settings
from klab.reports.figures.series import cube, mean_curve, run_states
from klab.reports.study import Study


@dataclass(frozen=True)
class PairContrast:
    """The second cell minus the first: a row of the analysis, with its interval, adjusted p and verdict."""

    difference: float
    low: float
    high: float
    p: float
    verdict: str
    pairs: int
    more_seeds: float


@dataclass(frozen=True)
class Pair:
    """What `klab compare` prints.

    Attributes:
        comparison: the comparison that `contrast` is a row of: that of the report where one of the two is the
            baseline, otherwise one with the first as the baseline.
        labels: the two names.
        settings: dotted key and both values, where they differ.
        rows: for each result, its title and both means over the seeds that have it.
        seeds: seed, both scores as they count (NaN where missing) and both states.
        contrast: second − first by the score.
        curves: quantity, both mean curves.
    """

    comparison: Comparison
    labels: tuple[str, str]
    settings: list[tuple[str, str, str]]
    rows: list[tuple[str, float, float]]
    seeds: list[tuple[int, float, float, str, str]]
    contrast: PairContrast
    curves: list[tuple[str, list[float], list[float]]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "score": self.comparison.score.name,
            "task": self.comparison.task,
            "cells": list(self.labels),
            "settings": [{"key": key, "first": first, "second": second} for key, first, second in self.settings],
            "results": [{"result": name, "first": first, "second": second} for name, first, second in self.rows],
            "seeds": [{"seed": seed, "first": x, "second": y, "states": [a, b]} for seed, x, y, a, b in self.seeds],
            "contrast": vars(self.contrast),
            "delta": self.comparison.analysis.delta,
            "notes": list(self.comparison.notes),
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


def compare_pair(study: Study, first: str, second: str, score: str | None = None, delta: float | None = None) -> Pair:
    """Two configurations of one task, same seeds against each other.

    Raises:
        UserError: when they belong to different tasks, or the score does not exist.
    """
    tasks = {str(study.cells.loc[study.cells["group"] == group, "task"].iloc[0]) for group in (first, second)}
    if len(tasks) > 1:
        raise UserError(
            f"the two cells belong to different tasks, {' and '.join(sorted(tasks))}, and cannot be compared",
            key="cell",
        )
    task = tasks.pop()
    baseline = second if study.baselines.get(task) == second else first
    main = compare(study, task, score, delta, baseline)
    at = (main.groups.index(first), main.groups.index(second))
    x, y = main.scores[at[0]], main.scores[at[1]]
    seeds = [
        (seed, float(x[i]), float(y[i]), main.states[at[0]][i], main.states[at[1]][i])
        for i, seed in enumerate(main.seeds)
        if main.states[at[0]][i] or main.states[at[1]][i]
    ]
    return Pair(
        main,
        (study.labels[first], study.labels[second]),
        _settings(study, first, second),
        _means(study, first, second),
        seeds,
        _contrast(main, first if baseline == second else second, -1.0 if baseline == second else 1.0),
        _curves(study, main, at),
    )


def _contrast(main: Comparison, group: str, sign: float) -> PairContrast:
    row = main.table[main.table["group"] == group].iloc[0]
    ends = sorted((sign * float(row["difference_low"]), sign * float(row["difference_high"])))
    return PairContrast(
        difference=sign * float(row["difference"]),
        low=ends[0],
        high=ends[1],
        p=float(row["p"]),
        verdict=str(row["verdict"]),
        pairs=int(row["pairs"]),
        more_seeds=float(row["more_seeds"]),
    )


def _settings(study: Study, first: str, second: str) -> list[tuple[str, str, str]]:
    left, right = settings(study.configurations[first]), settings(study.configurations[second])
    keys = dict.fromkeys([*left, *right])
    return [
        (key, left.get(key, "–"), right.get(key, "–"))
        for key in keys
        if key != "seed" and left.get(key) != right.get(key)
    ]


def _means(study: Study, first: str, second: str) -> list[tuple[str, float, float]]:
    left, right = (study.cells.loc[study.cells["group"] == group, list(RESULTS)].mean() for group in (first, second))
    return [(kind.title, float(left[name]), float(right[name])) for name, kind in RESULTS.items() if name != "updates"]


def _curves(study: Study, main: Comparison, at: tuple[int, int]) -> list[tuple[str, list[float], list[float]]]:
    found, states = [], run_states(study, main)
    for frame, column, title in (
        (study.metrics, "reward_mean", "reward"),
        (study.evaluations, "reverse_kl", "KL"),
        (study.metrics, "entropy", "entropy"),
    ):
        data = cube(study, main, frame, column)
        curves = [mean_curve(data, states, [i]) for i in at]
        lines = [[] if curve is None else curve.mean.tolist() for curve in curves]
        found.append((title, lines[0], lines[1]))
    return found
