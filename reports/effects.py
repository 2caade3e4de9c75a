"""Main effects and two-axis interactions of the design that was run, balanced or not, by least squares with seeds as blocks.

Model: score = block(seed) + Σ_axes effect(axis value) + error, one observation per (cell, seed). The error variance is the pure error
of the design (`statistics.block_error`: every cell its own mean), not the residual of the model, so that an interaction that the
model leaves out does not pass for noise. Where an axis is inactive in a cell (the estimator of a cell without KL) it counts as its
reference value. What the design cannot separate is reported as confounded, with what it is confounded with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import stats

from reports.statistics import Array, block_error, holm

_TOLERANCE = 1e-8


class Level(NamedTuple):
    """One value of an axis: its effect against the axis' reference value, other axes held, with a t-interval; NaN if confounded."""

    value: str
    estimate: float
    low: float
    high: float
    cells: int


class AxisEffect(NamedTuple):
    """One axis: its levels (the reference has effect 0), largest minus smallest effect, F-test and what it is confounded with.

    `share` is the share of the variance between observations, seeds removed, that only this axis explains.
    """

    axis: str
    reference: str
    levels: tuple[Level, ...]
    spread: float
    share: float
    f: float
    p: float
    p_holm: float
    confounded: tuple[str, ...]


class Interaction(NamedTuple):
    """A pair of axes: F-test of all their product terms beyond the main effects; `freedom` 0 means that the design has none."""

    first: str
    second: str
    share: float
    f: float
    p: float
    p_holm: float
    freedom: int


class Design(NamedTuple):
    """Observations of a design: scores `[cells, seeds]` (NaN missing) and, by axis, each cell's value (None where inactive)."""

    scores: Array
    values: Mapping[str, Sequence[str | None]]
    references: Mapping[str, str]


def main_effects(design: Design, level: float = 0.95) -> list[AxisEffect]:
    """The effect of every axis with at least two values, in order of their spread."""
    fit = _Fit(design)
    found = []
    for axis in fit.axes:
        others = fit.columns(without=(axis,))
        freedom = fit.rank(fit.columns()) - fit.rank(others)
        gain = fit.rss(others) - fit.rss(fit.columns())
        f, p = fit.test(gain, freedom)
        found.append(
            AxisEffect(axis, fit.reference(axis), fit.levels(axis, level), np.nan, fit.share(gain), f, p, np.nan, fit.confounded(axis))
        )
    adjusted = holm([effect.p for effect in found])
    complete = [
        effect._replace(spread=_spread(effect.levels), p_holm=float(p)) for effect, p in zip(found, adjusted, strict=True)
    ]
    return sorted(complete, key=lambda effect: -np.nan_to_num(effect.spread, nan=-1.0))


def interactions(design: Design) -> list[Interaction]:
    """Every pair of axes, strongest first. One-at-a-time designs have no freedom for any of them, and that is the answer."""
    fit = _Fit(design)
    base = fit.columns()
    rows = []
    for first, second in combinations(fit.axes, 2):
        products = np.einsum("ni,nj->nij", fit.dummies[first], fit.dummies[second]).reshape(fit.y.size, -1)
        both = np.hstack([base, products[:, np.abs(products).sum(0) > 0]])
        freedom = fit.rank(both) - fit.rank(base)
        gain = fit.rss(base) - fit.rss(both) if freedom else np.nan
        f, p = fit.test(gain, freedom)
        rows.append(Interaction(first, second, fit.share(gain), f, p, np.nan, freedom))
    adjusted = holm([row.p for row in rows])
    complete = [row._replace(p_holm=float(p)) for row, p in zip(rows, adjusted, strict=True)]
    return sorted(complete, key=lambda row: -np.nan_to_num(row.share, nan=-1.0))


def _spread(levels: Sequence[Level]) -> float:
    estimates = [level.estimate for level in levels if np.isfinite(level.estimate)]
    return float(max(estimates) - min(estimates)) if estimates else float("nan")


class _Fit:
    """The design matrix, one block of columns per axis and one for the seeds."""

    def __init__(self, design: Design) -> None:
        scores = np.asarray(design.scores, dtype=np.float64)
        cell, seed = np.nonzero(np.isfinite(scores))
        self.cell = cell
        observed = scores[cell, seed]
        self.y: Array = observed - observed.mean() if observed.size else observed
        self.variance, self.freedom = block_error(scores)
        self.seeds = (seed[:, None] == np.unique(seed)[None, :]).astype(np.float64)
        self.values: dict[str, list[str]] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self.dummies: dict[str, Array] = {}
        for axis, written in design.values.items():
            present = [written[i] for i in np.unique(cell)]
            order = list(dict.fromkeys(value for value in written if value is not None and value in present))
            if len(order) < 2:
                continue
            reference = design.references.get(axis)
            reference = reference if reference in order else order[0]
            order = [reference, *(value for value in order if value != reference)]
            column = np.asarray([str(written[i]) if written[i] is not None else reference for i in cell])
            self.values[axis] = order
            self.counts[axis] = {value: sum(item == value for item in present) for value in order}
            self.dummies[axis] = (column[:, None] == np.asarray(order[1:])[None, :]).astype(np.float64)
        self.axes = list(self.values)
        self._known: dict[bytes, tuple[int, float]] = {}

    def reference(self, axis: str) -> str:
        return self.values[axis][0]

    def columns(self, without: Sequence[str] = ()) -> Array:
        return np.hstack([self.seeds, *(self.dummies[axis] for axis in self.axes if axis not in without)])

    def rank(self, x: Array) -> int:
        return self._solve(x)[0]

    def rss(self, x: Array) -> float:
        return self._solve(x)[1]

    def _solve(self, x: Array) -> tuple[int, float]:
        # Few distinct rows: rank and residual from the Gram matrix, [columns, columns], are enough and fast.
        if not self.y.size:
            return 0, 0.0
        key = x.shape[1].to_bytes(4, "little") + np.packbits(x.astype(bool)).tobytes()
        if key not in self._known:
            values, vectors = np.linalg.eigh(x.T @ x)
            kept = values > _TOLERANCE * max(float(values.max(initial=0.0)), 1.0)
            coefficients = vectors[:, kept] @ ((vectors[:, kept].T @ (x.T @ self.y)) / values[kept])
            residual = self.y - x @ coefficients
            self._known[key] = int(kept.sum()), float(residual @ residual)
        return self._known[key]

    def share(self, gain: float) -> float:
        total = self.rss(self.seeds)
        return float(gain / total) if total > 0 else float("nan")

    def test(self, gain: float, freedom: int) -> tuple[float, float]:
        if freedom <= 0 or self.freedom <= 0:
            return float("nan"), float("nan")
        if self.variance <= 1e-24 * float(np.abs(self.y).max()) ** 2:
            return (float("inf"), 0.0) if gain > 1e-12 * self.rss(self.seeds) else (0.0, 1.0)
        f = max(gain, 0.0) / freedom / self.variance
        return float(f), float(stats.f.sf(f, freedom, self.freedom))

    def levels(self, axis: str, level: float) -> tuple[Level, ...]:
        x = self.columns()
        inverse = np.linalg.pinv(x.T @ x, rcond=_TOLERANCE, hermitian=True)
        coefficients = inverse @ (x.T @ self.y)
        projector = inverse @ (x.T @ x)
        before = self.seeds.shape[1] + sum(self.dummies[other].shape[1] for other in self.axes[: self.axes.index(axis)])
        quantile = float(stats.t.ppf(0.5 + level / 2, self.freedom)) if self.freedom > 0 else float("nan")
        found = [Level(self.reference(axis), 0.0, 0.0, 0.0, self.counts[axis][self.reference(axis)])]
        for position, value in enumerate(self.values[axis][1:]):
            contrast = np.zeros(x.shape[1])
            contrast[before + position] = 1.0
            if np.abs(contrast @ projector - contrast).max() > 1e-6:
                found.append(Level(value, np.nan, np.nan, np.nan, self.counts[axis][value]))
                continue
            estimate = float(contrast @ coefficients)
            half = quantile * float(np.sqrt(max(self.variance * (contrast @ inverse @ contrast), 0.0)))
            found.append(Level(value, estimate, estimate - half, estimate + half, self.counts[axis][value]))
        return tuple(found)

    def confounded(self, axis: str) -> tuple[str, ...]:
        """The axes without which more of this axis could be estimated."""
        missing = self.dummies[axis].shape[1] - (self.rank(self.columns()) - self.rank(self.columns((axis,))))
        if missing == 0:
            return ()
        partners = [
            other
            for other in self.axes
            if other != axis and self.rank(self.columns((other,))) - self.rank(self.columns((axis, other)))
            > self.dummies[axis].shape[1] - missing
        ]
        return tuple(partners) or ("a combination of other axes",)
