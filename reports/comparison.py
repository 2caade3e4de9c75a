"""Cells of one task compared on one number: scores by seed, contrasts with the baseline, ranks, effects of the axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd

from klab.grid import UserError
from klab.reports.axes import VariedAxis
from klab.reports.effects import AxisEffect, Design, Interaction, interactions, main_effects
from klab.reports.schema import LOWER_IS_BETTER, RESULTS, SUMMARY
from klab.reports.statistics import (
    Array,
    block_error,
    critical_difference,
    critical_groups,
    holm,
    paired_contrast,
    probability_of_improvement,
    t_interval,
)

_LOST = ("diverged", "failed", "damaged")


class ComparedStudy(Protocol):
    """What a comparison needs of a study; see `klab.reports.study.Study` for the attributes."""

    @property
    def cells(self) -> pd.DataFrame: ...
    @property
    def axes(self) -> tuple[VariedAxis, ...]: ...
    @property
    def values(self) -> Mapping[str, Mapping[str, str | None]]: ...
    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def baselines(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Comparison:
    """One task's cells, compared on `metric`.

    Attributes:
        groups: configurations, in the order of the grid.
        seeds: all seeds.
        raw: `[groups, seeds]`, the score of finished seeds, NaN elsewhere.
        scores: the same with diverged, failed and damaged seeds at `worst`; NaN where a seed has not ended.
        states: `[groups, seeds]`, state of each seed ("" where the design has none).
        worst: the worst score that any ended seed of the task has.
        table: one row per configuration, best first; `columns.SUMMARY` and ``group``.
        critical: smallest significant difference between two stable cells (Tukey, seeds as blocks); NaN without
            replication.
        tied: runs (first, last) of rows of `table`, stable cells only, that cannot be told apart.
        effects, interactions: of the varied axes.
        error, freedom: error variance of one score and its degrees of freedom.
    """

    task: str
    metric: str
    higher: bool
    groups: tuple[str, ...]
    seeds: tuple[int, ...]
    raw: Array
    scores: Array
    states: Sequence[Sequence[str]]
    worst: float
    baseline: str | None
    table: pd.DataFrame
    critical: float
    tied: tuple[tuple[int, int], ...]
    effects: tuple[AxisEffect, ...]
    interactions: tuple[Interaction, ...]
    error: float
    freedom: int

    @property
    def best(self) -> pd.DataFrame:
        """The stable cells that Tukey's test cannot tell from the best of them (the best alone where nothing can be
        tested).
        """
        return self.table[self.table["best_group"]]

    @property
    def comparable(self) -> bool:
        """Whether any cell has a score at all."""
        return bool(np.isfinite(self.scores).any())


def compare(study: ComparedStudy, task: str, metric: str = "reward_final") -> Comparison:
    """The comparison of all cells of `task` on the result column `metric`.

    Raises:
        UserError: for a metric that results do not have.
    """
    if metric not in RESULTS:
        raise UserError("unknown metric", key="metric", value=metric, allowed=RESULTS)
    cells = study.cells[study.cells["task"] == task]
    groups = tuple(dict.fromkeys(cells["group"]))
    seeds = tuple(sorted(set(cells["seed"])))
    row = {group: i for i, group in enumerate(groups)}
    column = {seed: i for i, seed in enumerate(seeds)}
    place = ([row[group] for group in cells["group"]], [column[seed] for seed in cells["seed"]])
    states = np.full((len(groups), len(seeds)), "", dtype=object)
    states[place] = cells["state"].to_numpy(dtype=object)
    values = np.full(states.shape, np.nan)
    values[place] = cells[metric].to_numpy(dtype=np.float64)
    higher = metric not in LOWER_IS_BETTER
    raw = np.where(states == "finished", values, np.nan)
    seen = np.where(np.isin(states, ["finished", "diverged"]), values, np.nan)
    seen = seen[np.isfinite(seen)]
    worst = float(seen.min() if higher else seen.max()) if seen.size else float("nan")
    scores = np.where(np.isin(states, _LOST) | ((states == "finished") & ~np.isfinite(values)), worst, raw)
    baseline = study.baselines.get(task)
    table = _table(study, task, groups, seeds, raw, scores, states, baseline, higher)
    lost = np.asarray(np.isin(states, _LOST).any(axis=1), dtype=np.bool_)
    kept = ~lost if np.isfinite(scores[~lost]).any() else np.ones_like(lost)
    critical = critical_difference(scores[kept])
    where = {group: i for i, group in enumerate(groups)}
    ranked = [i for i, group in enumerate(table["group"]) if kept[where[group]] and np.isfinite(table["mean"][i])]
    means = table["mean"].to_numpy(dtype=np.float64)[ranked] * (1 if higher else -1)
    spans = critical_groups(means, critical) if ranked and np.isfinite(critical) else []
    tied = tuple((ranked[first], ranked[last]) for first, last in spans)
    best = ranked[: spans[0][1] + 1] if spans else ranked[:1]
    table["best_group"] = [i in best for i in range(len(table))]
    design = Design(
        scores,
        {axis.key: [study.values[group][axis.key] for group in groups] for axis in study.axes},
        {key: value for key, value in study.values[baseline].items() if value is not None} if baseline else {},
        lost.tolist(),
    )
    variance, freedom = block_error(scores[kept])
    return Comparison(
        task,
        metric,
        higher,
        groups,
        seeds,
        raw,
        scores,
        states.tolist(),
        worst,
        baseline,
        table,
        critical,
        tied,
        tuple(main_effects(design)),
        tuple(interactions(design)),
        variance,
        freedom,
    )


def _table(
    study: ComparedStudy,
    task: str,
    groups: Sequence[str],
    seeds: Sequence[int],
    raw: Array,
    scores: Array,
    states: np.ndarray[tuple[int, int], np.dtype[np.object_]],
    baseline: str | None,
    higher: bool,
) -> pd.DataFrame:
    means = (
        study.cells.loc[study.cells["task"] == task]
        .groupby("group", sort=False)[["accuracy_final", "reverse_kl_final"]]
        .mean()
    )
    base = groups.index(baseline) if baseline in groups else None
    rows = []
    for i, group in enumerate(groups):
        interval = t_interval(scores[i])
        finished = raw[i][np.isfinite(raw[i])]
        record = {
            "group": group,
            "task": task,
            "label": study.labels[group],
            "n": interval.n,
            "mean": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            "mean_finished": float(finished.mean()) if finished.size else np.nan,
            "seeds": int(np.sum(states[i] != "")),
            "finished": int(np.sum(states[i] == "finished")),
            "diverged": int(np.sum(states[i] == "diverged")),
            "failed": int(np.sum(np.isin(states[i], ["failed", "damaged"]))),
            "unfinished": int(np.sum(np.isin(states[i], ["running", "stopped", "missing"]))),
            "accuracy_final": float(means.loc[group, "accuracy_final"]),  # type: ignore[arg-type]
            "reverse_kl_final": float(means.loc[group, "reverse_kl_final"]),  # type: ignore[arg-type]
            "difference": np.nan,
            "difference_low": np.nan,
            "difference_high": np.nan,
            "pairs": 0,
            "p": np.nan,
            "p_holm": np.nan,
            "improvement": np.nan,
            "rank": np.nan,
            "best_group": False,
            "stable": not np.isin(states[i], _LOST).any(),
        }
        if base is not None and i != base:
            contrast = paired_contrast(scores[i], scores[base])
            record.update(
                difference=contrast.estimate,
                difference_low=contrast.low,
                difference_high=contrast.high,
                pairs=contrast.n,
                p=contrast.p,
            )
            both = np.isfinite(scores[i]).any() and np.isfinite(scores[base]).any()
            chance = probability_of_improvement(scores[i][:, None], scores[base][:, None]) if both else np.nan
            record["improvement"] = chance if higher else 1 - chance
        rows.append(record)
    table = pd.DataFrame(rows, columns=["group", *SUMMARY])
    table["p_holm"] = holm(table["p"].to_numpy(dtype=np.float64))
    table = table.sort_values("mean", ascending=not higher, na_position="last", kind="stable", ignore_index=True)
    table["rank"] = table["mean"].rank(method="min", ascending=not higher)
    return table
