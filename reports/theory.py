"""Theory beside practice: how well what the exact lab says of a cell's gradient predicts the score that it reached."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from klab.reports.comparison import Comparison
from klab.reports.gradients import own_drift
from klab.reports.inference.design import Array, Indices
from klab.reports.inference.fraction import rank_correlation
from klab.reports.words import number

PREDICTORS = {
    "bias": "relative bias",
    "variance_relative": "relative variance",
    "mse": "mean squared error at the training batch",
    "ess": "effective sample size",
    "cosine": "cosine to the true gradient",
}
"""Numbers of the lab that are held against the score."""

LEAST = 6
"""Cells without which nothing is said."""
_LEVEL = 0.95 ** (1 / len(PREDICTORS))
"""Of each interval, so that all of them hold together with 95% (Šidák)."""


class Predictor(NamedTuple):
    """One number of the lab: Spearman's rank correlation with the score over `cells` cells, and its interval,
    joint with the others.

    `missed` are the cells whose rank is furthest from where a perfect relation of the same sign would put it.
    """

    name: str
    title: str
    correlation: float
    low: float
    high: float
    cells: int
    missed: tuple[str, ...]


def predictors(comparison: Comparison, gradients: pd.DataFrame | None) -> list[Predictor]:
    """Every number of the lab that varies over cells with a score, the strongest relation first.

    Cells are measured after the drift of their own updates, scaled to the drift that training showed where that is
    known (`gradients.own_drift`). Cells with equal gradients are one algorithm; they count once each, as in the study.
    """
    if gradients is None or gradients.empty:
        return []
    known = own_drift(gradients)
    table = comparison.table[np.isfinite(comparison.table["mean"])]
    table = table[[group in known.index for group in table["group"]]]
    rows = known.loc[table["group"]]
    found = []
    for name, title in PREDICTORS.items():
        if name not in rows:
            continue
        value = pd.to_numeric(rows[name], errors="coerce").to_numpy(dtype=np.float64)
        use = np.isfinite(value)
        score = table["mean"].to_numpy(dtype=np.float64)[use]
        rho, low, high = rank_correlation(value[use], score, _LEVEL) if use.sum() >= LEAST else (np.nan, np.nan, np.nan)
        if np.isfinite(rho):
            labels = table["label"].to_numpy(dtype=object)[use]
            missed = tuple(map(str, labels[_misfits(value[use], score, rho)[:3]]))
            found.append(Predictor(name, title, rho, low, high, int(use.sum()), missed))
    return sorted(found, key=lambda each: -abs(each.correlation))


def theory_words(found: list[Predictor]) -> str:
    """One sentence on the strongest relation, and where it fails; empty where nothing was measured."""
    if not found:
        return ""
    best = found[0]
    told = [each for each in found if each.low > 0 or each.high < 0]
    interval = f"{number(best.correlation, 2)} [{number(best.low, 2)}, {number(best.high, 2)}]"
    if not told:
        return (
            f"No number of the exact lab is seen to predict the ranks of the {best.cells} cells: the strongest rank "
            f"correlation with the score is that of the {best.title}, {interval}."
        )
    return (
        f"Of the numbers of the exact lab the {best.title} predicts the ranks of the {best.cells} cells best: rank "
        f"correlation with the score {interval}. It fails most for {', '.join(best.missed)}."
    )


def _misfits(value: Array, score: Array, rho: float) -> Indices:
    """Cells by how far their rank is from where a perfect relation would put it, the furthest first."""
    ranks, wanted = stats.rankdata(value), stats.rankdata(score)
    expected = ranks if rho >= 0 else len(value) + 1 - ranks
    return np.argsort(-np.abs(expected - wanted), kind="stable")
