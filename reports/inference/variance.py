"""Variance components of a study: between seeds, seed × axis, and the run-to-run variance of every cell.

Model, within one task: score[c, s] = μ[c] + b[s] + Σ_a u[a, v_a(c), s] + ε[c, s], all random terms independent and
normal with variances θ (seeds), τ²[a] (seed × axis a) and σ²[c] (runs of cell c).

τ² by Henderson's method III: with cells, seeds and seed × the other axes in the model, the reduction in the sum of
squares by seed × axis a has a mean square MS_a with f_a degrees of freedom and expectation σ² + τ²[a]·c_a/f_a; what is
left is MS_E. In a balanced product these are the error strata of a repeated-measures analysis of variance. σ²[c] by
empirical Bayes: the residual variance of each cell, seeds removed, shrunk towards the common one (`shrinkage`).

Sources: Henderson (1953), Biometrics 9:226; Searle, Casella and McCulloch (1992), *Variance components*, ch. 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from klab.reports.inference.design import Array, Design, Flags, Indices
from klab.reports.inference.shrinkage import prior_freedom

_TOLERANCE = 1e-8
_FEWEST_FREEDOM = 0.25
"""A cell with less than this many residual degrees of freedom says nothing about its own variance."""


@dataclass(frozen=True)
class AxisComponent:
    """Seed × axis in one task: τ² = ``scale``·(``mean_square`` − MS_E); ``freedom`` is that of the mean square.

    ``group`` is ``[N]``, the run's (value, seed), -1 for runs of other tasks.
    """

    axis: int
    task: int
    mean_square: float
    scale: float
    freedom: float
    group: Indices


@dataclass(frozen=True)
class Components:
    """Estimated variances.

    Attributes:
        cell_variance, cell_freedom: ``[C]``, σ² and its degrees of freedom; NaN where nothing can be said.
        pool: ``[C]``, cells with the same number share one estimate; -1 for a cell with its own.
        error, error_freedom: ``[tasks]``, MS_E and its degrees of freedom.
        axes: the seed × axis components.
        seed_variance, seed_freedom: ``[tasks]``, θ.
    """

    cell_variance: Array
    cell_freedom: Array
    pool: Indices
    error: Array
    error_freedom: Array
    axes: tuple[AxisComponent, ...]
    seed_variance: Array
    seed_freedom: Array


def estimate_components(design: Design, crossed: Flags) -> Components:
    """The variance components of every task.

    Args:
        crossed: ``[A]``, the axes that the design crosses with another one; only their variation with the seed can be
            told from that of the runs.
    """
    fits = [_TaskFit(design, task, crossed) for task in range(len(design.tasks))]
    variance, freedom = np.full(design.cells, np.nan), np.zeros(design.cells)
    pool = np.full(design.cells, -1, dtype=np.intp)
    for task, fit in enumerate(fits):
        here = design.task == task
        variance[here], freedom[here] = fit.variance[here], fit.freedom[here]
        pool[here & fit.pooled] = task
    seeds = np.asarray([fit.seed_component() for fit in fits]).reshape(-1, 2)
    return Components(
        cell_variance=variance,
        cell_freedom=freedom,
        pool=pool,
        error=np.asarray([fit.error for fit in fits]),
        error_freedom=np.asarray([fit.error_freedom for fit in fits]),
        axes=tuple(axis for fit in fits for axis in fit.axes),
        seed_variance=seeds[:, 0],
        seed_freedom=seeds[:, 1],
    )


class _TaskFit:
    """The variances of one task. Cells with diverged or stopped runs do not enter what is shared."""

    def __init__(self, design: Design, task: int, crossed: Flags) -> None:
        self.design = design
        replicated = (design.task == task) & (design.n >= 2)
        kept = replicated & (design.diverged + design.stopped == 0)
        self.kept = kept if kept.sum() >= 2 else replicated
        self.runs = np.flatnonzero(self.kept[design.cell])
        self.axes: list[AxisComponent] = []
        self.error, self.error_freedom = np.nan, 0.0
        self.variance, self.freedom = np.full(design.cells, np.nan), np.zeros(design.cells)
        self.pooled = np.zeros(design.cells, dtype=bool)
        if not self.runs.size:
            return
        shared = np.bincount(design.block[self.runs])[design.block[self.runs]] > 1
        strata = _Strata(design, self.runs[shared], seeds=True)
        # Where no two cells share seeds the seed is part of the run, and every cell has its ordinary variance.
        self.nested = strata.freedom <= 0
        if self.nested:
            strata = _Strata(design, self.runs, seeds=False)
        self.error, self.error_freedom = strata.error, float(strata.freedom)
        self._fit_axes(strata, task, [int(axis) for axis in np.flatnonzero(crossed)])
        self._fit_cells(strata)
        self._fit_apart(np.flatnonzero(replicated & ~self.kept), strata.error)

    def _fit_axes(self, strata: _Strata, task: int, axes: list[int]) -> None:
        design = self.design
        full = None if self.nested or not axes else _Strata(design, strata.runs, seeds=True, axes=axes)
        if full is None or full.freedom <= 0:
            return
        self.error, self.error_freedom = full.error, float(full.freedom)
        for axis, (mean_square, scale, freedom) in full.found.items():
            group = np.full(design.cell.size, -1, dtype=np.intp)
            here = design.task[design.cell] == task
            group[here] = (design.codes[design.cell, axis] * design.block_task.size + design.block)[here]
            self.axes.append(AxisComponent(axis, task, mean_square, scale, freedom, group))

    def _fit_cells(self, strata: _Strata) -> None:
        """Shrunk variances; cells whose own variance nothing tells have the common one.

        The residuals have seeds removed but not seed × axes, which would mix the cells' variances more; the common
        level is then brought from that of these residuals to MS_E.
        """
        own = strata.cell_freedom
        known = self.kept & (own > _FEWEST_FREEDOM)
        raw = np.where(known, strata.cell_squares / np.where(known, own, 1.0), 0.0)
        own = np.where(known, own, 0.0)
        positive = known & (raw > 1e-20 * float(np.max(np.abs(self.design.score), initial=0.0)) ** 2)
        # Two cells that share seeds have one residual variance between them; two that do not have one each.
        prior = 0.0 if self.nested else np.inf
        if positive.sum() >= 3:
            prior = prior_freedom(raw[positive], own[positive])
        if np.isinf(prior):
            variance = np.full(own.size, strata.error)
            self.pooled, self.freedom = self.kept.copy(), np.full(own.size, float(strata.freedom))
        else:
            variance = (prior * strata.error + own * raw) / np.maximum(prior + own, 1e-12)
            self.freedom = np.minimum(prior + own, float(strata.freedom))
        level = self.error / strata.error if strata.error > 0 else 1.0
        self.variance = np.where(self.kept, variance * level, np.nan)

    def _fit_apart(self, cells: Indices, common: float) -> None:
        """Cells with diverged or stopped runs have their own variance, but no less than the common one."""
        design, shifts = self.design, np.zeros(self.design.block_task.size)
        if not self.nested:
            centred = _centre(design.score[self.runs], design.cell[self.runs])
            counts = np.bincount(design.block[self.runs], minlength=shifts.size)
            shifts = np.bincount(design.block[self.runs], centred, shifts.size) / np.maximum(counts, 1)
        for cell in cells.tolist():
            score = (design.score - shifts[design.block])[design.cell == cell]
            self.variance[cell] = max(float(score.var(ddof=1)), common)
            self.freedom[cell] = score.size - 1

    def seed_component(self) -> tuple[float, float]:
        """θ from the variance over seeds within cells, and its degrees of freedom."""
        if not self.runs.size or self.nested:
            return 0.0, 1.0
        design = self.design
        score = _centre(design.score[self.runs], design.cell[self.runs])
        total = float(score @ score) / (self.runs.size - np.unique(design.cell[self.runs]).size)
        axes = sum(max(part.mean_square - self.error, 0.0) * part.scale for part in self.axes)
        seeds = np.unique(design.block[self.runs]).size
        return max(total - self.error - axes, 0.0), float(max(seeds - 1, 1))


class _Strata:
    """Sums of squares of seeds, of seed × axes and of what is left, the cells' means removed.

    Attributes:
        error, freedom: mean square of what is left, and its degrees of freedom.
        cell_squares, cell_freedom: ``[C]``, each cell's share of both.
        found: per axis, mean square, scale of τ² and degrees of freedom.
    """

    def __init__(self, design: Design, runs: Indices, seeds: bool, axes: list[int] | None = None) -> None:
        self.runs, self.freedom, self.error = runs, 0, np.nan
        self.found: dict[int, tuple[float, float, float]] = {}
        if not runs.size:
            return
        cell, block = np.unique(design.cell[runs], return_inverse=True)[1], design.block[runs]
        y = _centre(design.score[runs], cell)
        columns = [_indicators(block, cell)] if seeds else []
        parts: dict[int, Array] = {}
        for axis in axes or []:
            group = design.codes[design.cell[runs], axis] * (int(block.max()) + 1) + block
            parts[axis] = _indicators(group, cell)
        basis = _basis([*columns, *parts.values()], runs.size)
        fitted = basis.T @ y
        residual = y - basis @ fitted
        self.freedom = int(runs.size - cell.max() - 1 - basis.shape[1])
        if self.freedom <= 0:
            return
        self.error = float(residual @ residual) / self.freedom
        leverage = np.clip(1 - 1 / np.bincount(cell)[cell] - np.sum(basis**2, axis=1), 0.0, 1.0)
        self.cell_squares = np.bincount(design.cell[runs], residual**2, design.cells)
        self.cell_freedom = np.bincount(design.cell[runs], leverage, design.cells)
        for axis, part in parts.items():
            others = [other for key, other in parts.items() if key != axis]
            without = _basis([*columns, *others], runs.size)
            freedom = basis.shape[1] - without.shape[1]
            if freedom > 0:
                trace = float(np.sum(part**2) - np.sum((without.T @ part) ** 2))
                squares = float(fitted @ fitted) - float(np.sum((without.T @ y) ** 2))
                self.found[axis] = (max(squares, 0.0) / freedom, freedom / trace, float(freedom))


def _centre(values: Array, cell: Indices) -> Array:
    counts = np.maximum(np.bincount(cell), 1)
    return np.asarray(values - (np.bincount(cell, values) / counts)[cell], dtype=np.float64)


def _indicators(group: Indices, cell: Indices) -> Array:
    """One column per group, the cells' means removed."""
    number = np.unique(group, return_inverse=True)[1]
    columns = np.zeros((group.size, int(number.max()) + 1))
    columns[np.arange(group.size), number] = 1.0
    means = np.zeros((int(cell.max()) + 1, columns.shape[1]))
    np.add.at(means, (cell, number), 1.0)
    means /= np.bincount(cell)[:, None]
    return np.asarray(columns - means[cell], dtype=np.float64)


def _basis(parts: list[Array], rows: int) -> Array:
    """Orthonormal basis, ``[rows, rank]``, of the columns; the Gram matrix of indicators is small and well scaled."""
    if not parts:
        return np.zeros((rows, 0))
    columns = np.hstack(parts)
    values, vectors = np.linalg.eigh(columns.T @ columns)
    kept = values > _TOLERANCE * max(float(values.max()), 1.0)
    return np.asarray(columns @ (vectors[:, kept] / np.sqrt(values[kept])), dtype=np.float64)
