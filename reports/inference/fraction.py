"""Inference from a fractional design: effects of axes and pairs, and how far they predict cells that were held out.

A cell's score is the model's plus an effect of the cell itself, which stands for everything that the model leaves out,
plus noise. Effects are hence tested against the spread of cells about the model, not against the spread of seeds alone:
what is found holds for combinations that were not run. Where axes act otherwise from seed to seed, that enters too.

Sources: Langsrud (2003), Statistics and Computing 13:163 (tests that respect marginality); Satterthwaite (1946);
    Bonett and Wright (2000), Psychometrika 65:23 (interval of a rank correlation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd
from scipy import special, stats

from klab.reports.inference.design import Array, Design, Indices
from klab.reports.inference.factorial import Model, Resolution, Term, model_of, resolution
from klab.reports.inference.family import Family, independent_family, no_verdicts


@dataclass(frozen=True)
class Fit:
    """What a fractional design says as a whole.

    Attributes:
        axes: the axes, in the order of the terms' numbers.
        resolution: what its cells can tell apart.
        terms: one row per axis and pair of the model: ``axis``, ``other`` (None for an axis alone), ``coefficients``,
            ``share`` (of the variance between cells, without what chance adds), ``F``, ``p`` (of this term alone).
        cells: one row per cell with a score: ``cell`` (its index in the design), ``held_out``, ``observed`` (mean over
            seeds), ``additive`` and ``predicted`` (by the model of axes alone, and with pairs where it fits).
        predictions: one row per model: ``model``, ``cells`` (held out), ``rmse``, ``r2`` (1 − mean square of the
            errors over that about the mean of the fitted cells), ``rank_correlation``, ``low``, ``high``.
        noise: the error of a prediction that chance alone would leave: the standard error of a cell's mean.
    """

    axes: tuple[str, ...]
    resolution: Resolution
    terms: pd.DataFrame
    cells: pd.DataFrame
    predictions: pd.DataFrame
    noise: float


class Fraction:
    """The model of one task's cells, or of their means over the tasks, fitted to those that were not held out."""

    def __init__(self, design: Design, held_out: Sequence[int]) -> None:
        self.design = design
        codes, owner = np.unique(design.codes, axis=0, return_inverse=True)
        self.codes, self.owner = codes.astype(np.intp), owner.ravel()
        self.table = _scores(design, self.owner, len(codes))
        self.mean = self._means()
        held = np.zeros(len(codes), dtype=bool)
        held[self.owner[list(held_out)]] = True
        known = np.isfinite(self.mean)
        self.fitted, self.predicted = np.flatnonzero(known & ~held), np.flatnonzero(known & held)
        self.levels = [len(each) for each in design.levels]
        self.resolution = resolution(self.codes[self.fitted], self.levels)
        self.main = self._model(False)
        self.model = self._model(True) if self.resolution.fits_pairs else self.main
        self.usable = self.resolution.fits_main
        if self.usable:
            self._solve()

    def _model(self, pairs: bool) -> Model:
        return model_of(self.codes[self.fitted], self.levels, pairs)

    def _means(self) -> Array:
        """``[cells]``, means over seeds; where seeds are missing, of what is left when every seed's own level is
        taken off. Missing scores are then filled with those of their cell and seed."""
        table = self.table
        level = np.zeros(table.shape[1])
        with np.errstate(invalid="ignore"):
            for _ in range(50 if np.isnan(table).any() else 1):
                mean = _nanmean(table - level, axis=1)
                level = _nanmean(table - mean[:, None], axis=0)
                level = np.nan_to_num(level - np.nanmean(level)) if np.isfinite(level).any() else np.zeros_like(level)
            mean = _nanmean(table - level, axis=1)
        self.filled = np.where(np.isfinite(table), table, mean[:, None] + level)
        return mean

    def _solve(self) -> None:
        matrix, score = self.model.matrix, self.mean[self.fitted]
        self.inverse = np.linalg.inv(matrix.T @ matrix)
        self.coefficients = self.inverse @ (matrix.T @ score)
        self.freedom = float(len(matrix) - matrix.shape[1])
        self.mean_square = float(np.sum((score - matrix @ self.coefficients) ** 2) / self.freedom)
        self._between_seeds()

    def _between_seeds(self) -> None:
        """By term, the variance of a coefficient's mean over the seeds: as it varies from seed to seed, as the noise of
        runs makes it, and the degrees of freedom of the former. Empty with one seed."""
        self.strata: dict[Term, tuple[float, float, float]] = {}
        table = self.filled[self.fitted]
        cells, seeds = table.shape
        missing = int(np.isnan(self.table[self.fitted]).sum())
        freedom = (cells - 1) * (seeds - 1) - missing
        self.run_variance = np.nan
        if seeds < 2 or freedom < 1:
            return
        centred = table - table.mean(axis=1, keepdims=True)
        centred = centred - centred.mean(axis=0, keepdims=True)
        self.run_variance = float(np.sum(centred**2) / freedom)
        each = self.inverse @ (self.model.matrix.T @ centred)  # [P, seeds]
        for term, place in self.model.places.items():
            count = place.stop - place.start
            between = float(count * (seeds - 1))
            found = float(np.sum(each[place] ** 2) / between) / seeds
            noise = self.run_variance * float(np.mean(np.diag(self.inverse)[place])) / seeds
            self.strata[term] = (found, noise, between)

    @property
    def pairs_fit(self) -> bool:
        """Whether effects of pairs of axes are estimated."""
        return self.usable and self.resolution.fits_pairs

    def family(self, term: Term, values: Sequence[tuple[int, ...]], alpha: float, delta: float) -> Family:
        """Differences from the baseline's value (of an axis), or differences of differences (of a pair)."""
        if not self.usable or term not in self.strata:
            return no_verdicts(len(values))
        weights = np.zeros((len(values), self.model.columns))
        for row, value in enumerate(values):
            steps = [
                self.model.contrasts[axis][own] - self.model.contrasts[axis][0]
                for axis, own in zip(term, value, strict=True)
            ]
            weights[row, self.model.places[term]] = steps[0] if len(term) == 1 else np.outer(*steps).ravel()
        estimate = weights @ self.coefficients
        variance, freedom = self._variance(term, weights)
        n = np.full(len(values), int(np.isfinite(self.table[self.fitted]).sum(axis=1).min()), dtype=np.intp)
        result = independent_family(estimate, np.sqrt(variance), freedom, n, alpha, delta)
        # More seeds do not bring the cells nearer to the model.
        return replace(result, more=np.full(len(values), np.nan))

    def _variance(self, term: Term, weights: Array) -> tuple[Array, Array]:
        """Of combinations of the term's coefficients, with degrees of freedom.

        What varies from seed to seed has the few degrees of freedom that the seeds give; the rest of the spread of
        cells about the model has those of the cells.
        """
        found, noise, between = self.strata[term]
        size = np.sum(weights**2, axis=1)
        seeds = max(found, noise) * size
        within = self.mean_square * np.einsum("ij,jk,ik->i", weights, self.inverse, weights)
        cells = np.maximum(within - noise * size, 0.0)
        variance = seeds + cells
        with np.errstate(divide="ignore", invalid="ignore"):
            freedom = variance**2 / (seeds**2 / between + cells**2 / self.freedom)
        return variance, np.where(variance > 0, freedom, self.freedom)

    def fit(self) -> Fit:
        """The tables about the design as a whole."""
        cells = np.concatenate([self.fitted, self.predicted])
        table = pd.DataFrame(
            {
                "cell": [int(np.flatnonzero(self.owner == cell)[0]) for cell in cells.tolist()],
                "held_out": np.isin(cells, self.predicted),
                "observed": self.mean[cells],
                "additive": self._predictions(self.main, cells),
                "predicted": self._predictions(self.model, cells),
            }
        )
        present = np.isfinite(self.table[cells]).sum(axis=1)
        noise = np.sqrt(self.run_variance / np.median(present)) if self.usable and len(cells) else np.nan
        return Fit(
            self.design.axes,
            self.resolution,
            self._terms(),
            table,
            _quality(table, self.resolution.fits_pairs),
            float(noise),
        )

    def _predictions(self, model: Model, cells: Indices) -> Array:
        if not self.usable:
            return np.full(len(cells), np.nan)
        coefficients = np.linalg.lstsq(model.matrix, self.mean[self.fitted], rcond=None)[0]
        rows = [model.row(self.codes[cell].tolist()) for cell in cells.tolist()]
        return np.asarray(np.asarray(rows).reshape(len(cells), model.columns) @ coefficients)

    def _terms(self) -> pd.DataFrame:
        columns = ["axis", "other", "coefficients", "share", "F", "p"]
        if not self.usable:
            return pd.DataFrame(columns=columns)
        score = self.mean[self.fitted]
        total = float(np.sum((score - score.mean()) ** 2))
        rows = []
        for term, place in self.model.places.items():
            others = [each for each in self.model.places if each != term and not set(term) < set(each)]
            without = self._residual(others)
            added = without - self._residual([*others, term])
            count = place.stop - place.start
            ratio = added / count / self.mean_square if self.mean_square > 0 else np.inf if added > 0 else 0.0
            share = max(added - count * self.mean_square, 0.0) / total if total > 0 else 0.0
            names = [self.design.axes[axis] for axis in term]
            p = float(special.fdtrc(count, self.freedom, ratio))
            rows.append((names[0], names[1] if len(names) > 1 else None, count, share, float(ratio), p))
        return pd.DataFrame(rows, columns=columns)

    def _residual(self, terms: Sequence[Term]) -> float:
        """The sum of squares about the model of these terms."""
        columns = np.concatenate(
            [[0], *(np.arange(place.start, place.stop) for place in map(self.model.places.__getitem__, terms))]
        )
        part = self.model.matrix[:, columns.astype(np.intp)]
        score = self.mean[self.fitted]
        return float(np.sum((score - part @ np.linalg.lstsq(part, score, rcond=None)[0]) ** 2))

    def values(self, term: Term) -> list[tuple[int, ...]]:
        """The values of an axis, or pairs of values, that are compared with the baseline's."""
        return list(product(*(range(1, self.levels[axis]) for axis in term)))


def _scores(design: Design, owner: Indices, count: int) -> Array:
    """``[cells, seeds]``, scores as they count; with several tasks their mean over all of them. NaN where missing."""
    seeds = int(design.block_seed.max()) + 1 if design.block_seed.size else 0
    table = np.full((len(design.tasks), count, seeds), np.nan)
    table[design.task[design.cell], owner[design.cell], design.block_seed[design.block]] = design.score
    return np.asarray(table.mean(axis=0))


def _quality(cells: pd.DataFrame, pairs: bool) -> pd.DataFrame:
    columns = ["model", "cells", "rmse", "r2", "rank_correlation", "low", "high"]
    held, fitted = cells[cells["held_out"]], cells[~cells["held_out"]]
    models = [("axes", "additive"), *([("axes and pairs", "predicted")] if pairs else [])]
    rows = []
    for name, column in models if len(held) > 3 and held[["additive", "predicted"]].notna().all(axis=None) else []:
        error = float(np.mean((held["observed"] - held[column]) ** 2))
        spread = float(np.mean((held["observed"] - fitted["observed"].mean()) ** 2))
        rho, low, high = rank_correlation(held["observed"].to_numpy(), held[column].to_numpy())
        rows.append((name, len(held), np.sqrt(error), 1 - error / spread if spread > 0 else np.nan, rho, low, high))
    return pd.DataFrame(rows, columns=columns)


def rank_correlation(first: Array, second: Array, level: float = 0.95) -> tuple[float, float, float]:
    """Spearman's rank correlation with its interval; NaN where either has one value only, or of fewer than 4 pairs."""
    if len(first) < 4 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return np.nan, np.nan, np.nan
    rho = float(stats.spearmanr(first, second).statistic)
    half = float(stats.norm.ppf(0.5 + level / 2) * np.sqrt((1 + rho**2 / 2) / (len(first) - 3)))
    z = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12))
    return rho, float(np.tanh(z - half)), float(np.tanh(z + half))


def _nanmean(values: Array, axis: int) -> Array:
    count = np.isfinite(values).sum(axis=axis)
    return np.asarray(np.where(count > 0, np.nansum(values, axis=axis) / np.maximum(count, 1), np.nan))
