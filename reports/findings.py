"""The first screen of a task: the answer, what each axis did, what was lost, and how much evidence there is.

Every sentence about a difference repeats a row of the analysis; nothing here is computed from scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from klab.reports.comparison import Comparison
from klab.reports.fraction_words import prediction_words, resolution_words
from klab.reports.frame import records
from klab.reports.inference import DIFFERS, EQUIVALENT
from klab.reports.study import Study
from klab.reports.words import difference_span, joined, number, p_words


class AxisFinding(NamedTuple):
    """An axis with its verdict: of its clearest value the difference from the baseline's value, its interval and p.

    `size` is the absolute difference, NaN where none could be formed.
    """

    axis: str
    title: str
    verdict: str
    value: str
    difference: float
    low: float
    high: float
    p: float
    size: float
    words: str


@dataclass(frozen=True)
class Findings:
    """The first screen of one task."""

    headline: str
    best: list[dict[str, object]]
    best_words: str
    axes: list[AxisFinding]
    lost: list[dict[str, object]]
    lost_words: str
    stopped: int
    evidence: list[tuple[str, str]]
    cautions: list[str]


def find(study: Study, comparison: Comparison) -> Findings:
    """Everything that the first screen says."""
    axes = axis_findings(study, comparison)
    return Findings(
        headline=_headline(study, comparison),
        best=records(comparison.table[np.isfinite(comparison.table["mean"])].head(4)),
        best_words=_best_words(comparison),
        axes=axes,
        lost=_lost(comparison),
        lost_words=_lost_words(comparison),
        stopped=int(comparison.table["stopped"].sum()),
        evidence=_evidence(study, comparison),
        cautions=_cautions(study, comparison, axes),
    )


def axis_findings(study: Study, comparison: Comparison) -> list[AxisFinding]:
    """The axes of the analysis, those that differ first, then by the size of the difference."""
    titles = {axis.key: axis.title for axis in study.axes}
    estimated = set(comparison.analysis.levels["axis"])
    found = []
    for row in records(comparison.analysis.effects):
        value = "–" if row["value"] is None else str(row["value"])
        span = difference_span(row["difference"], row["low"], row["high"])
        if row["axis"] not in estimated:
            words = "no two cells differ in this axis alone"
        elif not np.isfinite(row["p"]):
            words = "nothing can be inferred"
        elif row["verdict"] == DIFFERS:
            words = f"{value} differs: {span}, {p_words(row['p'])}"
        elif row["verdict"] == EQUIVALENT:
            words = f"equivalent: within ±{comparison.analysis.delta:g}"
        else:
            more = f"; about {row['more_seeds']:.0f} more seeds would tell" if np.isfinite(row["more_seeds"]) else ""
            words = f"undecided, clearest {value} {span}, {p_words(row['p'])}{more}"
        found.append(
            AxisFinding(
                axis=row["axis"],
                title=titles.get(row["axis"], row["axis"]),
                verdict=row["verdict"],
                value=value,
                difference=row["difference"],
                low=row["low"],
                high=row["high"],
                p=row["p"],
                size=abs(row["difference"]),
                words=words,
            )
        )
    return sorted(found, key=lambda axis: (axis.verdict != DIFFERS, -np.nan_to_num(axis.size, nan=-1.0)))


def _headline(study: Study, comparison: Comparison) -> str:
    top = comparison.table.iloc[0] if len(comparison.table) else None
    if top is not None and np.isfinite(top["mean"]) and top["group"] in _still(study, comparison):
        return (
            f"{comparison.analysis.headline} But the policy gradient of the best mean was 0 in every update: it has "
            "learnt nothing from its rewards."
        )
    return comparison.analysis.headline


def _still(study: Study, comparison: Comparison) -> dict[str, int]:
    """Configurations with runs whose policy gradient was 0 in every update, and how many; in the order of the table."""
    cells = study.cells[(study.cells["task"] == comparison.task) & (study.cells["zero_gradient"] == 1)]
    runs = cells["group"].value_counts()
    return {group: int(runs[group]) for group in comparison.table["group"] if group in runs}


def _best_words(comparison: Comparison) -> str:
    if not comparison.inferred:
        return "Means without intervals: nothing is inferred from them."
    better = int(comparison.table["better"].sum())
    if comparison.baseline is None:
        return "Intervals hold for all cells together."
    found = f"{better} cell{'s differ' if better != 1 else ' differs'} from the baseline for the better"
    return f"{found if better else 'No cell differs from the baseline for the better'}. Intervals hold for all cells."


def _lost(comparison: Comparison) -> list[dict[str, object]]:
    table = comparison.table.assign(lost=comparison.table[["diverged", "stopped", "failed"]].sum(axis=1))
    return records(table[table["lost"] > 0].sort_values("lost", ascending=False, kind="stable"))


def _lost_words(comparison: Comparison) -> str:
    kinds = ["diverged", "stopped", "failed", "unfinished"]
    sums = comparison.table[[*kinds, "seeds"]].sum()
    parts = [f"{int(sums[key])} {key}" for key in kinds if sums[key]]
    if not parts:
        return f"All {int(sums['seeds'])} runs finished."
    return f"{', '.join(parts)} of {int(sums['seeds'])} runs."


def _evidence(study: Study, comparison: Comparison) -> list[tuple[str, str]]:
    cells = study.cells[study.cells["task"] == comparison.task]
    seeds = comparison.table["seeds"]
    budgets = sorted(cells["updates_planned"].unique())
    hours = float(np.nansum(cells["seconds"])) / 3600
    return [
        ("cells", str(len(comparison.table))),
        ("seeds each", str(seeds.min()) if seeds.min() == seeds.max() else f"{seeds.min()}–{seeds.max()}"),
        ("runs", str(int(seeds.sum()))),
        ("updates", "–".join(f"{value:g}" for value in dict.fromkeys((budgets[0], budgets[-1])))),
        ("worker-hours", f"{hours:.2g}" if hours < 10 else f"{hours:.0f}"),
    ]


def noise_words(comparison: Comparison) -> str:
    """How much of the spread between seeds is the evaluations' own sampling; empty without two seeds."""
    seeds, sampling = comparison.seed_deviation, comparison.sampling_deviation
    if not np.isfinite(seeds):
        return ""
    words = f"The {comparison.score.title} has a standard deviation of {number(seeds)} between the seeds of a cell"
    if not np.isfinite(sampling):
        return words + "."
    words += f"; sampling the completions of the last evaluations alone gives {number(sampling)}."
    if 0 < seeds < 2 * sampling:
        words += " More completions (training.final_evaluation_samples) would sharpen every comparison."
    return words


def _cautions(study: Study, comparison: Comparison, axes: list[AxisFinding]) -> list[str]:
    found = []
    cells = study.cells[study.cells["task"] == comparison.task]
    if still := _still(study, comparison):
        runs, names = sum(still.values()), [study.labels[group] for group in still]
        shown = [*names[:6], *([f"{len(names) - 6} more"] if len(names) > 6 else [])]
        found.append(
            f"The policy gradient was 0 in every update of {runs} run{'s' * (runs > 1)} (zero_gradient), which learnt "
            f"nothing from the rewards: {joined(shown)}."
        )
    if timeouts := int(np.nansum(cells["reward_timeouts"])):
        runs = int((cells["reward_timeouts"] > 0).sum())
        found.append(
            f"{timeouts} reward{'s' * (timeouts > 1)} of {runs} run{'s' * (runs > 1)} counted as wrong because a time "
            "limit was reached (reward_timeouts): they depend on the speed of the machine."
        )
    found += comparison.notes
    if comparison.analysis.fit is not None:
        fit, titles = comparison.analysis.fit, {axis.key: axis.title for axis in study.axes}
        found.append(resolution_words(fit.resolution, [titles.get(key, key) for key in fit.axes], study.candidates))
        if words := prediction_words(fit):
            found.append(words)
    elif len(axes) > 1 and comparison.analysis.interactions.empty:
        found.append(
            "The design changes one axis at a time: whether axes act together cannot be seen here (a product of axes "
            "shows it)."
        )
    if noise := noise_words(comparison):
        found.append(noise)
    return found
