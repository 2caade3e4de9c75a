"""The answer in words: what is best, which axes matter, what was lost, and how much evidence there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from klab.reports.comparison import Comparison
from klab.reports.effects import AxisEffect
from klab.reports.frame import records
from klab.reports.schema import TITLES
from klab.reports.study import Study

LEVEL = 0.05


class AxisFinding(NamedTuple):
    """An axis with its verdict: its title, best value, worst value, spread, p, whether that is beyond chance, and
    lost seeds.
    """

    effect: AxisEffect
    title: str
    best: str
    worst: str
    matters: bool
    clear_values: tuple[str, ...]
    verdict: str


@dataclass(frozen=True)
class Findings:
    """The first screen of one task."""

    headline: str
    best: list[dict[str, object]]
    ties: str
    axes: list[AxisFinding]
    lost: list[dict[str, object]]
    lost_words: str
    evidence: list[tuple[str, str]]
    cautions: list[str]


def find(study: Study, comparison: Comparison) -> Findings:
    """Everything that the first screen says, from the comparison alone."""
    axes = [_axis(study, comparison, effect) for effect in comparison.effects]
    axes.sort(key=lambda axis: not axis.matters)
    return Findings(
        headline=_headline(study, comparison, axes),
        best=records(comparison.best.head(4)) if comparison.comparable else [],
        ties=_ties(comparison),
        axes=axes,
        lost=_lost(study, comparison),
        lost_words=_lost_words(comparison),
        evidence=_evidence(study, comparison),
        cautions=_cautions(study, comparison, axes),
    )


def number(value: float, digits: int = 3) -> str:
    """A score for a sentence; a dash where there is none."""
    return f"{value:.{digits}f}" if np.isfinite(value) else "–"


def signed(value: float, digits: int = 3) -> str:
    """A difference for a sentence, with its sign; a dash where there is none."""
    return f"{value:+.{digits}f}".replace("-", "−") if np.isfinite(value) else "–"


def p_words(p: float) -> str:
    if not np.isfinite(p):
        return "no test possible"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _axis(study: Study, comparison: Comparison, effect: AxisEffect) -> AxisFinding:
    title = next(axis.title for axis in study.axes if axis.key == effect.axis)
    known = [level for level in effect.levels if np.isfinite(level.estimate)]
    ordered = sorted(known, key=lambda level: level.estimate, reverse=comparison.higher)
    best, worst = (ordered[0].value, ordered[-1].value) if len(known) > 1 else ("", "")
    clear = tuple(level.value for level in known if level.low > 0 or level.high < 0)
    matters = bool(np.isfinite(effect.p_holm) and effect.p_holm < LEVEL)
    if effect.confounded:
        verdict = "cannot be told from " + ", ".join(effect.confounded)
    elif not np.isfinite(effect.p_holm):
        verdict = "too few seeds to tell"
    elif matters:
        verdict = "matters"
    elif clear:
        verdict = f"only {', '.join(clear)} differs from {effect.reference}"
    else:
        verdict = "no effect beyond seed noise"
    return AxisFinding(effect, title, best, worst, matters, clear, verdict)


def _headline(study: Study, comparison: Comparison, axes: list[AxisFinding]) -> str:
    name = TITLES[comparison.metric]
    if not comparison.comparable:
        states = comparison.table[["diverged", "failed", "unfinished"]].sum()
        if states["unfinished"] and not states["diverged"] + states["failed"]:
            return f"No cell has ended yet: there is no {name} to compare."
        return f"No cell has a {name}: all {int(states['diverged'] + states['failed'])} ended runs diverged or failed."
    finished = comparison.table["finished"].sum()
    if not finished:
        return "Every ended seed diverged or failed: no cell of this study trains."
    if np.nanmax(comparison.scores) == np.nanmin(comparison.scores):
        value = number(comparison.worst)
        return f"Every seed of every cell ended with the same {name}, {value}: nothing here separates the cells."
    top = comparison.best.iloc[0]
    mattering = [axis for axis in axes if axis.matters]
    if mattering:
        lead = f"{_and([axis.title for axis in mattering[:3]])} made the difference"
    elif axes and all(np.isnan(axis.effect.p_holm) for axis in axes):
        lead = f"With this many seeds no axis can be tested; the largest change comes with {axes[0].title}"
    elif axes:
        lead = "No axis moved the score beyond seed noise"
    else:
        lead = "No axis varies in this study"
    sentence = f"{lead[0].upper()}{lead[1:]}. Best is {top['label']} with a {name} of {number(top['mean'])}"
    if np.isfinite(top["low"]):
        sentence += f" [{number(top['low'])}, {number(top['high'])}]"
    if np.isfinite(top["difference"]):
        sentence += f", {signed(top['difference'])} against the baseline"
    others = len(comparison.best) - 1
    if others and np.isfinite(comparison.critical):
        sentence += f"; {others} other{'s' if others > 1 else ''} cannot be told from it"
    if top["group"] in _still(study, comparison):
        sentence += ". But its policy gradient was 0 in every update: it has learnt nothing from its rewards"
    return sentence + "."


def _still(study: Study, comparison: Comparison) -> dict[str, int]:
    """Configurations with runs whose policy gradient was 0 in every update, and how many; in the order of the table."""
    cells = study.cells[(study.cells["task"] == comparison.task) & (study.cells["zero_gradient"] == 1)]
    runs = cells["group"].value_counts()
    return {group: int(runs[group]) for group in comparison.table["group"] if group in runs}


def _ties(comparison: Comparison) -> str:
    if not comparison.comparable:
        return ""
    count = len(comparison.best)
    if not np.isfinite(comparison.critical):
        return "One seed per cell, or too few: nothing can be called different."
    if count == 1:
        return f"No other stable cell is within the critical difference of {number(comparison.critical)}."
    return f"{count} cells cannot be told apart (critical difference {number(comparison.critical)})."


def _lost(study: Study, comparison: Comparison) -> list[dict[str, object]]:
    table = comparison.table[comparison.table["diverged"] + comparison.table["failed"] > 0]
    table = table.assign(lost=table["diverged"] + table["failed"]).sort_values("lost", ascending=False, kind="stable")
    return records(table)


def _lost_words(comparison: Comparison) -> str:
    sums = comparison.table[["diverged", "failed", "unfinished", "seeds"]].sum()
    parts = [f"{int(sums[key])} {key}" for key in ("diverged", "failed", "unfinished") if sums[key]]
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


def _cautions(study: Study, comparison: Comparison, axes: list[AxisFinding]) -> list[str]:
    found = []
    cells = study.cells[study.cells["task"] == comparison.task]
    if still := _still(study, comparison):
        runs, names = sum(still.values()), [study.labels[group] for group in still]
        shown = [*names[:6], *([f"{len(names) - 6} more"] if len(names) > 6 else [])]
        found.append(
            f"The policy gradient was 0 in every update of {runs} run{'s' * (runs > 1)} (zero_gradient), which learnt "
            f"nothing from the rewards: {_and(shown)}."
        )
    if timeouts := int(np.nansum(cells["reward_timeouts"])):
        runs = int((cells["reward_timeouts"] > 0).sum())
        found.append(
            f"{timeouts} reward{'s' * (timeouts > 1)} of {runs} run{'s' * (runs > 1)} counted as wrong because a time "
            "limit was reached (reward_timeouts): they depend on the speed of the machine."
        )
    pairs = int(comparison.table["pairs"].max()) if len(comparison.table) else 0
    if 1 < pairs <= 5:
        found.append(
            f"With {pairs} seed pairs the sign-flip test cannot give p below {2.0 ** (1 - pairs):g}; intervals and "
            "Tukey's test carry the comparison."
        )
    if len(axes) > 1 and not any(pair.freedom for pair in comparison.interactions):
        found.append(
            "The design changes one axis at a time: whether axes act together cannot be seen here (a product of axes "
            "shows it)."
        )
    for axis in axes:
        if axis.effect.confounded:
            found.append(
                f"{axis.title} changes together with {', '.join(axis.effect.confounded)}: their effects cannot be "
                "separated."
            )
    return found


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
