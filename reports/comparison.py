"""Cells of one task compared by one score: the runs as they count, and the inference about them.

All intervals, p and verdicts are those of `klab.reports.analyse`; a comparison adds names, states and a ranking.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from klab.grid.score import DEFAULT_SCORE, LM_EVAL, Score, parse_score
from klab.reports.axes import value_words
from klab.reports.censored import Sensitivity, sensitivity
from klab.reports.conduct import Conduct
from klab.reports.inference import DELTA, DIFFERS, Analysis, analyse, counted_scores
from klab.reports.schema import SUMMARY
from klab.reports.scores import Array, ScoredStudy, run_scores, sampling_deviations, score_notes

LOST = ("diverged", "stopped", "failed", "damaged")
OPEN = ("running", "interrupted", "missing")
RUN_COLUMNS = ("seed", "score", "state")
CONFIGURATION = "configuration"
"""An axis of this name tells configurations apart that have the same value on every other axis."""


class ComparedStudy(ScoredStudy, Protocol):
    """What a comparison needs of a study; see `klab.reports.study.Study` for the attributes."""

    @property
    def values(self) -> Mapping[str, Mapping[str, str | None]]: ...
    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def baselines(self) -> Mapping[str, str]: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def conduct(self) -> Conduct: ...
    @property
    def held_out(self) -> Collection[str] | None: ...


@dataclass(frozen=True)
class Comparison:
    """One task's cells, compared by `score`.

    Attributes:
        task: the task's label.
        score: what they are compared by; `score.title` is its name in sentences, `score.higher` its direction.
        groups: configurations, in the order of the grid.
        seeds: all seeds.
        scores: ``[groups, seeds]``, the scores that count: stopped runs with their last evaluation, diverged runs at
            `worst`, NaN where nothing counts.
        states: ``[groups, seeds]``, state of each run ("" where the design has none).
        worst: the worst score of a finished or stopped run, which diverged runs count as; NaN where there is none.
        baseline: the group that others are compared with; None where there is none.
        baseline_words: what the baseline is on the varied axes; empty where there is none or nothing varies.
        analysis: what `analyse` says of this task and score. The rows of its `cells` are those of `groups`.
        table: one row per configuration, best first: ``group`` and the columns of `schema.SUMMARY`.
        seed_deviation: standard deviation of scores of finished runs between the seeds of a cell, pooled over cells;
            NaN without two seeds.
        sampling_deviation: the part of it that comes from sampling completions in the evaluations, as root mean
            square over runs; NaN where that is not known.
        censored: how far verdicts depend on what stopped runs would have reached; None where none was stopped.
        notes: what to know about the score, and before trusting the analysis.
    """

    task: str
    score: Score
    groups: tuple[str, ...]
    seeds: tuple[int, ...]
    scores: Array
    states: Sequence[Sequence[str]]
    worst: float
    baseline: str | None
    baseline_words: str
    analysis: Analysis
    table: pd.DataFrame
    seed_deviation: float
    sampling_deviation: float
    notes: tuple[str, ...]
    censored: Sensitivity | None = None

    @property
    def comparable(self) -> bool:
        """Whether any cell has a score at all."""
        return bool(np.isfinite(self.scores).any())

    @property
    def inferred(self) -> bool:
        """Whether any cell has an interval: with one seed per cell none has."""
        return bool(np.isfinite(self.table["low"]).any())


def compare(
    study: ComparedStudy,
    task: str,
    score: str | Score | None = None,
    delta: float | None = None,
    baseline: str | None = None,
    share: float | None = None,
) -> Comparison:
    """The comparison of all cells of `task` by `score`.

    The tasks of a study share its error rate evenly, see `error_share`. Contrasts that were stated beforehand have most
    of it.

    Args:
        score: as `klab.grid.score.parse_score` reads it; None: the one that the study states, or the default.
        delta: differences smaller than this count as none; None: as the study states, or 0.05.
        baseline: the group to compare with; by default the study's for this task.
        share: the part of the error rate that the study may use; None: that of its newest look.

    Raises:
        UserError: for a score that does not exist.
    """
    score, delta = asked(study, score, delta)
    mine = (study.cells["task"] == task).to_numpy()
    cells = study.cells[mine]
    groups = tuple(dict.fromkeys(cells["group"]))
    seeds = tuple(sorted(set(cells["seed"])))
    base = baseline or study.baselines.get(task)
    values = run_scores(study, score)[mine]
    frame, reference = run_frame(study, cells, values, base)
    if reference is None and study.held_out is not None and CONFIGURATION not in frame:
        # the model of a fraction needs no baseline cell, only a value of every axis to count from
        reference = {axis.key: axis.values[0] for axis in study.axes}
        base = next((group for group in groups if study.values[group] == reference), None)
    own = base is not None and base == study.baselines.get(task)
    stated = study.conduct.stated & set(groups) - {base} if own else set()

    def analysed(runs: pd.DataFrame) -> Analysis:
        return analyse(
            runs,
            reference,
            delta,
            higher=score.higher,
            share=error_share(study, share),
            stated=axis_values(frame, cells, stated),
            held_out=None if study.held_out is None else axis_values(frame, cells, study.held_out),
        )

    analysis = analysed(frame)
    censored = sensitivity(frame, (cells["group"] == base).to_numpy(), analysis, analysed, score.higher)
    row, column = {group: i for i, group in enumerate(groups)}, {seed: i for i, seed in enumerate(seeds)}
    place = ([row[group] for group in cells["group"]], [column[seed] for seed in cells["seed"]])
    state = cells["state"].to_numpy(dtype=object)
    states = np.full((len(groups), len(seeds)), "", dtype=object)
    states[place] = state
    counted, worst = counted_scores(values, state, score.higher)
    scores = np.full(states.shape, np.nan)
    scores[place] = counted
    sampled = sampling_deviations(study, score)[mine][state == "finished"]
    sampled = sampled[np.isfinite(sampled)]
    return Comparison(
        task=task,
        score=score,
        groups=groups,
        seeds=seeds,
        scores=scores,
        states=states.tolist(),
        worst=worst,
        baseline=base if base in row else None,
        baseline_words=value_words(study.axes, study.values[base]) if base is not None and base in row else "",
        analysis=analysis,
        table=_table(study, task, cells, groups, states, base, analysis, censored, score),
        seed_deviation=_pooled_deviation(np.where(states == "finished", scores, np.nan)),
        sampling_deviation=float(np.sqrt(np.mean(sampled**2))) if sampled.size else np.nan,
        notes=(
            *score_notes(study, score),
            *analysis.notes,
            *(() if censored is None else (censored.words(score.title),)),
        ),
        censored=censored,
    )


def compare_all(
    study: ComparedStudy, scores: Sequence[Score] | None = None, delta: float | None = None
) -> list[Comparison]:
    """Every task's comparison by the first score, then by the next; each score has an error rate of its own.

    Scores and margin that are not given are those that the study states.
    """
    return [compare(study, task, score, delta) for score in scores or (None,) for task in study.tasks]


def asked(study: ComparedStudy, score: str | Score | None, delta: float | None) -> tuple[Score, float]:
    """The score and the margin to compare by."""
    score = study.conduct.score or DEFAULT_SCORE if score is None else score
    delta = study.conduct.delta if delta is None else delta
    return parse_score(score) if isinstance(score, str) else score, DELTA if delta is None else delta


def common_baseline(study: ComparedStudy) -> Mapping[str, Any] | None:
    """The axis values of the baseline where it is the same configuration on every one of several tasks."""
    values = [study.values[study.baselines[task]] for task in study.tasks if task in study.baselines]
    if len(study.tasks) < 2 or len(values) < len(study.tasks) or any(each != values[0] for each in values):
        return None
    return values[0]


def error_share(study: ComparedStudy, share: float | None = None) -> float:
    """The part of a study's error rate that each of its analyses uses: every task has one, and all of them together.

    What earlier looks at the study used is taken off first (`conduct.share`).
    """
    whole = study.conduct.share if share is None else share
    return whole / max(len(study.tasks) + (common_baseline(study) is not None), 1)


def run_frame(
    study: ComparedStudy, cells: pd.DataFrame, values: Array, baseline: str | None
) -> tuple[pd.DataFrame, dict[str, Any] | None]:
    """The tidy frame that `analyse` reads, a row per row of `cells`, and the baseline's values; None without one.

    Axes have the keys of the grid file; a value of None is an axis that does nothing in that cell.
    """
    groups = list(dict.fromkeys(cells["group"]))
    keys = [axis.key for axis in study.axes]
    rows = {group: {key: study.values[group][key] for key in keys} for group in groups}
    tasks = dict(zip(cells["group"], cells["task"], strict=True))
    kinds: dict[tuple[str | None, ...], list[str]] = {}
    for group in groups:
        kinds.setdefault((tasks[group], *rows[group].values()), []).append(group)
    if any(len(alike) > 1 for alike in kinds.values()):
        for alike in kinds.values():
            for group in alike:
                rows[group][CONFIGURATION] = group[-8:] if len(alike) > 1 else None
    columns = {
        key: pd.Series([rows[group][key] for group in cells["group"]], dtype=object)
        for key in (rows[groups[0]] if groups else keys)
    }
    runs = {"seed": cells["seed"].to_numpy(), "score": values, "state": cells["state"].to_numpy(dtype=object)}
    return pd.DataFrame({**columns, **runs}), rows.get(baseline or "")


def axis_values(frame: pd.DataFrame, cells: pd.DataFrame, groups: Collection[str]) -> list[dict[str, Any]]:
    """What the frame of `run_frame` calls these configurations, in the order of the cells."""
    first = {group: place for place, group in reversed(list(enumerate(cells["group"])))}
    keys = [key for key in frame.columns if key not in RUN_COLUMNS]
    return [{str(key): frame.at[first[group], key] for key in keys} for group in reversed(first) if group in groups]


def _pooled_deviation(scores: Array) -> float:
    present = np.isfinite(scores)
    n = present.sum(axis=1)
    freedom = int((n[n > 1] - 1).sum())
    if not freedom:
        return float("nan")
    kept = np.where(present, scores, 0.0)[n > 1]
    centred = np.where(present[n > 1], kept - kept.sum(axis=1, keepdims=True) / n[n > 1, None], 0.0)
    return float(np.sqrt(np.sum(centred**2) / freedom))


def _table(
    study: ComparedStudy,
    task: str,
    cells: pd.DataFrame,
    groups: Sequence[str],
    states: np.ndarray[tuple[int, int], np.dtype[np.object_]],
    baseline: str | None,
    analysis: Analysis,
    censored: Sensitivity | None,
    score: Score,
) -> pd.DataFrame:
    metrics = [str(name) for name in cells if str(name).startswith(LM_EVAL) and cells[name].notna().any()]
    means = (
        cells.groupby("group", sort=False)[["accuracy_final", "reward_final", "reverse_kl_final", *metrics]]
        .mean()
        .reindex(list(groups))
    )
    table = pd.DataFrame(
        {
            "group": list(groups),
            "task": task,
            "score": score.name,
            "label": [study.labels[group] for group in groups],
            **{name: analysis.cells[name].to_numpy() for name in ("n", "mean", "low", "high")},
            "seeds": (states != "").sum(axis=1),
            "finished": (states == "finished").sum(axis=1),
            "diverged": (states == "diverged").sum(axis=1),
            "stopped": (states == "stopped").sum(axis=1),
            "failed": np.isin(states, ["failed", "damaged"]).sum(axis=1),
            "unfinished": np.isin(states, OPEN).sum(axis=1),
            "accuracy_final": means["accuracy_final"].to_numpy(),
            "reward_final": means["reward_final"].to_numpy(),
            "reverse_kl_final": means["reverse_kl_final"].to_numpy(),
            **{name: means[name].to_numpy() for name in metrics},
        }
    )
    compared = [i for i, group in enumerate(groups) if group != baseline]
    rows = analysis.contrasts.assign(
        bound_low=np.nan if censored is None else censored.low,
        bound_high=np.nan if censored is None else censored.high,
        depends=False if censored is None else censored.depends,
    )
    contrasts = rows.set_index(pd.Index(compared)).reindex(range(len(groups)))
    for name, column in (
        ("difference", "difference"),
        ("difference_low", "low"),
        ("difference_high", "high"),
        ("p", "p"),
        ("verdict", "verdict"),
        ("pairs", "pairs"),
        ("more_seeds", "more_seeds"),
        ("bound_low", "bound_low"),
        ("bound_high", "bound_high"),
    ):
        table[name] = contrasts[column]
    for name in ("stated", "depends"):
        table[name] = contrasts[name].astype(object).fillna(False).astype(bool)
    table["pairs"] = table["pairs"].fillna(0).astype(int)
    table["verdict"] = table["verdict"].astype(object).where(table["verdict"].notna(), "")
    gain = table["difference"] if score.higher else -table["difference"]
    table["better"] = (table["verdict"] == DIFFERS) & (gain > 0)
    table["stable"] = table[["diverged", "stopped", "failed"]].sum(axis=1) == 0
    table = table.sort_values("mean", ascending=not score.higher, na_position="last", kind="stable", ignore_index=True)
    table["rank"] = table["mean"].rank(method="min", ascending=not score.higher)
    return table[["group", *SUMMARY, *metrics]]
