"""Main effects and two-axis interactions of the design that was run, by least squares with seeds as blocks.

Model: score = block(seed) + Σ_axes effect(axis value) + error, one observation per (cell, seed). The error variance
is the pure error of the design (`statistics.block_error`: every cell its own mean), not the residual of the
model, so that an interaction that the model leaves out does not pass for noise. A cell that lost seeds (their
scores stand at the worst) has its own, larger variance, so that one diverging cell does not hide the differences
between all others; intervals then use Satterthwaite's degrees of freedom and tests the ANOVA-type statistic of
Brunner, Dette and Munk (1997). Without such cells both are the ordinary t and F.

Where an axis is inactive in a cell (the estimator of a cell without KL) it counts as its reference value. What the
design cannot separate is reported as confounded, with what it is confounded with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from klab.reports.statistics import Array, block_error, finite, holm, seed_shifts

_TOLERANCE = 1e-8


class Level(NamedTuple):
    """One value of an axis: its effect against the axis' reference value with a t-interval; NaN if confounded."""

    value: str
    estimate: float
    low: float
    high: float
    cells: int


class AxisEffect(NamedTuple):
    """One axis: its levels (the reference has effect 0), largest minus smallest effect, F-test, confounding.

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
    """A pair of axes: F-test of their product terms beyond the main effects; `freedom` 0: the design has none."""

    first: str
    second: str
    share: float
    f: float
    p: float
    p_holm: float
    freedom: int


class Design(NamedTuple):
    """Observations of a design.

    `scores` is `[cells, seeds]` (NaN missing); `values` has, by axis, each cell's value (None where inactive); `lost`
    marks the cells that lost a seed.
    """

    scores: Array
    values: Mapping[str, Sequence[str | None]]
    references: Mapping[str, str]
    lost: Sequence[bool] = ()


def main_effects(design: Design, level: float = 0.95) -> list[AxisEffect]:
    """The effect of every axis with at least two values, in order of their spread."""
    fit = _Fit(design)
    found = []
    for axis in fit.axes:
        test = fit.test(fit.columns(without=(axis,)), fit.dummies[axis])
        found.append(
            AxisEffect(
                axis,
                fit.reference(axis),
                fit.levels(axis, level),
                np.nan,
                test.share,
                test.f,
                test.p,
                np.nan,
                fit.confounded(axis),
            )
        )
    adjusted = holm([effect.p for effect in found])
    complete = [
        effect._replace(spread=_spread(effect.levels), p_holm=float(p))
        for effect, p in zip(found, adjusted, strict=True)
    ]
    return sorted(complete, key=lambda effect: -np.nan_to_num(effect.spread, nan=-1.0))


def interactions(design: Design) -> list[Interaction]:
    """Every pair of axes, strongest first. One-at-a-time designs have no freedom for any of them, and that is the
    answer.
    """
    fit = _Fit(design)
    base = fit.columns()
    rows = []
    for first, second in combinations(fit.axes, 2):
        products = np.einsum("ni,nj->nij", fit.dummies[first], fit.dummies[second]).reshape(fit.y.size, -1)
        test = fit.test(base, products[:, np.abs(products).sum(0) > 0])
        rows.append(Interaction(first, second, test.share, test.f, test.p, np.nan, test.freedom))
    adjusted = holm([row.p for row in rows])
    complete = [row._replace(p_holm=float(p)) for row, p in zip(rows, adjusted, strict=True)]
    return sorted(complete, key=lambda row: -np.nan_to_num(row.share, nan=-1.0))


def _spread(levels: Sequence[Level]) -> float:
    estimates = [level.estimate for level in levels if np.isfinite(level.estimate)]
    return float(max(estimates) - min(estimates)) if estimates else float("nan")


class _Test(NamedTuple):
    share: float
    f: float
    p: float
    freedom: int


class _Fit:
    """The design matrix, one block of columns per axis and one for the seeds, and the error variance of every
    observation.
    """

    def __init__(self, design: Design) -> None:
        scores = np.asarray(design.scores, dtype=np.float64)
        cell, seed = np.nonzero(np.isfinite(scores))
        observed = scores[cell, seed]
        self.y: Array = observed - observed.mean() if observed.size else observed
        self.seeds = (seed[:, None] == np.unique(seed)[None, :]).astype(np.float64)
        self.values: dict[str, list[str]] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self.dummies: dict[str, Array] = {}
        present = np.unique(cell)
        for axis, written in design.values.items():
            order = list(dict.fromkeys(value for i in present.tolist() if (value := written[i]) is not None))
            if len(order) < 2:
                continue
            reference = design.references.get(axis)
            reference = reference if reference in order else order[0]
            order = [reference, *(value for value in order if value != reference)]
            column = np.asarray([str(written[i]) if written[i] is not None else reference for i in cell.tolist()])
            self.values[axis] = order
            self.counts[axis] = {value: sum(written[i] == value for i in present.tolist()) for value in order}
            self.dummies[axis] = (column[:, None] == np.asarray(order[1:])[None, :]).astype(np.float64)
        self.axes = list(self.values)
        self._set_variances(scores, cell, np.asarray(design.lost or [False] * len(scores), dtype=bool))

    def _set_variances(self, scores: Array, cell: NDArray[np.intp], lost: NDArray[np.bool_]) -> None:
        # Component 0 is the pooled error; each cell that lost seeds is a component of its own.
        kept = ~lost if np.isfinite(scores[~lost]).any() else np.ones_like(lost)
        variance, freedom = block_error(scores[kept])
        self.variances, self.freedoms = [variance], [freedom]
        self.component = np.zeros(cell.size, dtype=np.intp)
        if not np.isfinite(variance):
            return
        shift = seed_shifts(scores[kept])
        for i in np.flatnonzero(~kept):
            own = finite(scores[i] - shift)
            if own.size > 1:
                self.component[cell == i] = len(self.variances)
                self.variances.append(max(float(own.var(ddof=1)), variance))
                self.freedoms.append(own.size - 1)

    def reference(self, axis: str) -> str:
        return self.values[axis][0]

    def columns(self, without: Sequence[str] = ()) -> Array:
        return np.hstack([self.seeds, *(self.dummies[axis] for axis in self.axes if axis not in without)])

    def test(self, base: Array, extra: Array) -> _Test:
        """What `extra` columns explain beyond `base`."""
        basis = _new_directions(base, extra)
        freedom = basis.shape[1]
        if not freedom or not self.y.size:
            return _Test(np.nan, np.nan, np.nan, 0)
        gain = float(np.sum((basis.T @ self.y) ** 2))
        total = float(np.sum((self.y - _projection(self.seeds, self.y)) ** 2))
        share = gain / total if total > 0 else 0.0
        if self.freedoms[0] <= 0:
            return _Test(share, np.nan, np.nan, freedom)
        variances = np.asarray(self.variances)
        if variances.max() <= 1e-24 * float(np.abs(self.y).max()) ** 2:
            return _Test(share, *((np.inf, 0.0) if share > 1e-12 else (0.0, 1.0)), freedom)
        spread = basis.T @ (variances[self.component][:, None] * basis)
        f = gain / float(np.trace(spread))
        above = float(np.trace(spread)) ** 2 / float(np.sum(spread**2))
        below = self._freedom(self._by_component(np.sum(basis**2, axis=1)))
        return _Test(share, float(f), float(stats.f.sf(f, above, below)), freedom)

    def _by_component(self, weights: Array) -> Array:
        size = len(self.variances)
        return np.bincount(self.component, weights=weights, minlength=size).astype(np.float64)

    def _freedom(self, weights: Array) -> float:
        """Satterthwaite's degrees of freedom of Σ weight·variance over the components."""
        terms = weights * np.asarray(self.variances)
        denominator = float(np.sum(terms**2 / np.asarray(self.freedoms)))
        return float(np.sum(terms)) ** 2 / denominator if denominator > 0 else float(self.freedoms[0])

    def levels(self, axis: str, level: float) -> tuple[Level, ...]:
        x = self.columns()
        inverse = np.linalg.pinv(x.T @ x, rcond=_TOLERANCE, hermitian=True)
        projector = inverse @ (x.T @ x)
        before = self.seeds.shape[1] + sum(self.dummies[other].shape[1] for other in self.axes[: self.axes.index(axis)])
        found = [Level(self.reference(axis), 0.0, 0.0, 0.0, self.counts[axis][self.reference(axis)])]
        for position, value in enumerate(self.values[axis][1:]):
            contrast = np.zeros(x.shape[1])
            contrast[before + position] = 1.0
            if np.abs(contrast @ projector - contrast).max() > 1e-6:
                found.append(Level(value, np.nan, np.nan, np.nan, self.counts[axis][value]))
                continue
            influence = x @ (inverse @ contrast)
            estimate, half = float(influence @ self.y), float("nan")
            if self.freedoms[0] > 0:
                weights = self._by_component(influence**2)
                quantile = float(stats.t.ppf(0.5 + level / 2, self._freedom(weights)))
                half = quantile * float(np.sqrt(weights @ np.asarray(self.variances)))
            found.append(Level(value, estimate, estimate - half, estimate + half, self.counts[axis][value]))
        return tuple(found)

    def confounded(self, axis: str) -> tuple[str, ...]:
        """The axes without which more of this axis could be estimated."""
        own = self.dummies[axis]

        def estimable(without: Sequence[str]) -> int:
            return int(_new_directions(self.columns(without), own).shape[1])

        now = estimable((axis,))
        if now == own.shape[1]:
            return ()
        partners = [other for other in self.axes if other != axis and estimable((axis, other)) > now]
        return tuple(partners) or ("a combination of other axes",)


def _projection(x: Array, y: Array) -> Array:
    # The Gram matrix is small and well scaled: columns are indicators.
    return np.asarray(x @ (np.linalg.pinv(x.T @ x, rcond=_TOLERANCE, hermitian=True) @ (x.T @ y)), dtype=np.float64)


def _new_directions(base: Array, extra: Array) -> Array:
    """Orthonormal basis, `[observations, directions]`, of what `extra` spans beyond `base`."""
    rest = extra - _projection(base, extra)
    values, vectors = np.linalg.eigh(rest.T @ rest)
    kept = values > _TOLERANCE * max(float(len(rest)), 1.0)
    return np.asarray(rest @ (vectors[:, kept] / np.sqrt(values[kept])), dtype=np.float64)
