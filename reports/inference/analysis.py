"""One inference for one study: every interval, p, verdict and sentence about it comes from here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from klab.grid import UserError
from klab.reports.inference.contrasts import (
    Builder,
    Combinations,
    Matched,
    all_squares,
    baseline_contrasts,
    crossed_axes,
    matched_pairs,
    stacked,
)
from klab.reports.inference.design import TASK, Design, Indices, cell_with, read_design
from klab.reports.inference.effect_tables import Effect, attach, effects_table, interactions_table, levels_table
from klab.reports.inference.error_rate import ALONE, ALPHA, SHARES, STATED, divided
from klab.reports.inference.family import Estimates, Family, joined, no_verdicts
from klab.reports.inference.fraction import Fit, Fraction
from klab.reports.inference.headline import headline, notes
from klab.reports.inference.variance import estimate_components

DELTA = 0.05
"""Differences smaller than this count as none, unless `delta` says otherwise: five points of a reward in [0, 1]."""


class Best(NamedTuple):
    """The cell with the best mean; the interval holds although the cell was chosen for its mean."""

    cell: dict[str, Any]
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Analysis:
    """What can be said about a study. Every error rate is `alpha` for all of it together.

    Attributes:
        headline: the answer in a few sentences.
        best: the cell with the best mean over its runs (over the tasks where there are several; the cell then has no
            task); None where no cell has a score.
        cells: one row per cell: the axes, ``n`` (counted runs), ``mean``, ``low``, ``high`` (simultaneous over the
            cells, so that they hold for a cell picked out afterwards), ``diverged``, ``stopped``.
        contrasts: one row per cell but the baseline: the axes, ``difference`` from the baseline (of its task),
            ``low``, ``high`` (simultaneous), ``p`` (adjusted), ``verdict``, ``pairs`` (seeds that both have),
            ``more_seeds`` (per cell, that would decide an undecided one at the present estimates), ``stated``
            (beforehand).
        across: the same per configuration, averaged over the tasks; empty with one task.
        levels: one row per axis and value: ``axis``, ``value``, ``difference`` from the baseline's value over all pairs
            of cells that differ in nothing else, ``low``, ``high``, ``p``, ``verdict``, ``pairs``, ``more_seeds``.
        effects: one row per axis: ``axis``, ``p``, ``verdict``, and of its clearest value ``value``, ``difference``,
            ``low``, ``high``, ``more_seeds``.
        interactions: one row per pair of axes that the design crosses: ``axis``, ``other``, ``p``, ``verdict``, and of
            the clearest pair of values ``value``, ``other_value``, ``difference`` (of differences), ``low``, ``high``,
            ``more_seeds``.
        notes: what a reader should know before trusting the rest.
        fit: of a fractional design, its model as a whole, whose effects and interactions are shown; else None.
        delta, alpha: differences below `delta` count as none; the joint error rate.
    """

    headline: str
    best: Best | None
    cells: pd.DataFrame
    contrasts: pd.DataFrame
    across: pd.DataFrame
    levels: pd.DataFrame
    effects: pd.DataFrame
    interactions: pd.DataFrame
    notes: tuple[str, ...]
    delta: float
    alpha: float = ALPHA
    fit: Fit | None = None


def analyse(
    frame: pd.DataFrame,
    baseline: Mapping[str, Any] | None,
    delta: float = DELTA,
    *,
    higher: bool = True,
    share: float = 1.0,
    stated: Sequence[Mapping[str, Any]] = (),
    held_out: Sequence[Mapping[str, Any]] | None = None,
) -> Analysis:
    """The inference of a study.

    Args:
        frame: one row per run: a column per axis (values as written), ``seed``, ``score`` (NaN where missing) and
            ``state`` (``finished``, ``diverged``, ``stopped``, ``failed``, ``missing``). A column ``task`` is a
            stratum.
        baseline: the baseline's value on every axis; None: there is none, and nothing is compared.
        delta: differences smaller than this count as none.
        higher: whether a higher score is better.
        share: the part of the error rate that this analysis may use, where several are shown together, or at a look
            at a study that grows (`error_rate.look_share`). p is scaled with it, so that 0.05 stays the threshold.
        stated: the cells, by their values on every axis (and the task, where there is one), whose contrasts were stated
            beforehand: they are a family of their own with most of the contrasts' error rate.
        held_out: of a fractional design, the cells that are predicted, not fitted; None: the design is another one.

    Raises:
        UserError: for a column, state, axis or value that is not there, and for two rows of one cell and seed.
    """
    if not (np.isfinite(delta) and delta >= 0):
        raise UserError("the margin of equivalence is a number of at least 0", key="delta", value=delta)
    if not 0 < share <= 1:
        raise UserError("not a share of the error rate, 0 < share ≤ 1", key="share", value=share)
    design = read_design(frame, baseline, higher)
    fraction = None if held_out is None else Fraction(design, [cell_with(design, values) for values in held_out])
    return _Inference(design, float(delta), higher, ALPHA * share, stated, fraction).analysis()


class _Inference:
    """Everything that is estimated, as rows of one table of estimates, and the tables made of it."""

    def __init__(
        self,
        design: Design,
        delta: float,
        higher: bool,
        alpha: float,
        stated: Sequence[Mapping[str, Any]],
        fraction: Fraction | None,
    ) -> None:
        self.design, self.delta, self.higher, self.alpha, self.fraction = design, delta, higher, alpha, fraction
        self.stated = np.zeros(design.cells, dtype=bool)
        self.stated[[cell_with(design, values) for values in stated]] = True
        n = design.n
        self.lost = all(cell < 0 or n[cell] == 0 for cell in design.baseline)
        self.several = len(design.tasks) > 1
        squares = {} if fraction else all_squares(design)
        self.squares = {pair: found for pair, found in squares.items() if len(found.cells)}
        varied = [axis for axis in range(len(design.axes)) if len(design.levels[axis]) > 1]
        self.varied = varied
        self.pairs = {} if fraction else {axis: matched_pairs(design, axis) for axis in varied}
        self.configurations, owner = np.unique(design.codes, axis=0, return_inverse=True)
        self.configuration = owner.ravel()
        self._build()
        components = estimate_components(design, crossed_axes(design, squares))
        self.estimates = Estimates(stacked([found for found, _ in self.parts.values()]), design, components)

    def _build(self) -> None:
        design, builder = self.design, Builder(self.design)
        self.parts: dict[object, tuple[Combinations, int]] = {}
        means = builder.combine(np.arange(design.cells, dtype=np.intp)[:, None], (1.0,))
        self._add("means", means)
        self.others, contrasts = baseline_contrasts(design, builder)
        self._add("contrasts", contrasts)
        if self.several:
            count = len(self.configurations)
            complete = np.bincount(self.configuration[means.known], minlength=count) == len(design.tasks)
            self._add("means across", means.averaged(self.configuration, count).only(complete))
            self._add("across", contrasts.averaged(self.configuration[self.others], count))
        for axis, found in self.pairs.items():
            each = builder.combine(found.cells, (1.0, -1.0))
            self._add(axis, each.averaged(found.owner, len(found.values)))
        for pair, found in self.squares.items():
            each = builder.combine(found.cells, (1.0, -1.0, -1.0, 1.0))
            self._add(pair, each.averaged(found.owner, len(found.values)))

    def _add(self, key: object, found: Combinations) -> None:
        start = sum(part.known.size for part, _ in self.parts.values())
        self.parts[key] = (found, start)

    def _rows(self, key: object) -> Indices:
        found, start = self.parts[key]
        return np.arange(start, start + found.known.size, dtype=np.intp)

    def _family(self, rows: Indices, alpha: float, joint: bool = True) -> Family:
        return self.estimates.family(rows, alpha, self.delta, joint)

    def analysis(self) -> Analysis:
        means = self._family(self._rows("means"), self.alpha)
        cells = self._named(np.arange(self.design.cells, dtype=np.intp))
        cells["n"], cells["mean"], cells["low"], cells["high"] = self.design.n, means.estimate, means.low, means.high
        cells["diverged"], cells["stopped"] = self.design.diverged, self.design.stopped
        contrasts, across = self._contrasts()
        levels, effects = self._effects()
        found = Analysis(
            headline="",
            best=self._best(means),
            cells=cells,
            contrasts=contrasts,
            across=across,
            levels=levels,
            effects=effects,
            interactions=self._interactions(),
            notes=notes(self.design, self.lost, fitted=self.fraction is not None),
            delta=self.delta,
            alpha=self.alpha,
            fit=self.fraction.fit() if self.fraction else None,
        )
        return replace(
            found, headline=headline(found, self.design, self.lost, self.higher, fitted=self.fraction is not None)
        )

    def _contrasts(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        design = self.design
        changed = np.flatnonzero(self.configurations.any(axis=1))
        rows = self._rows("contrasts")
        if self.several:
            rows = np.concatenate([rows, self._rows("across")[changed]])
        share = SHARES[0] if self.squares or self.fraction else ALONE if len(rows) > 1 else 1.0
        family = self._split(rows, self.alpha * share)
        table, across = (
            self._named(self.others),
            self._named(self._representatives(changed if self.several else changed[:0])),
        )
        split = len(self.others)
        attach(table, family.part(slice(0, split)), "pairs")
        table["stated"] = self.stated[self.others]
        across = across.drop(columns=TASK, errors="ignore")
        attach(across, family.part(slice(split, None)), "pairs")
        # An axis that changes in single steps from the baseline has these rows as its effects.
        start = split if self.several else 0
        names = self.configurations[changed] if self.several else design.codes[self.others]
        self.contrast_family = family
        self.contrast_of = {tuple(code): start + i for i, code in enumerate(names.tolist())}
        return table, across

    def _split(self, rows: Indices, alpha: float) -> Family:
        """The contrasts as one family, or those that were stated beforehand apart from the others."""
        stated = np.zeros(len(rows), dtype=bool)
        stated[: len(self.others)] = self.stated[self.others]
        if not stated.any() or stated.all():
            return self._family(rows, alpha)
        parts = [(np.flatnonzero(stated), STATED), (np.flatnonzero(~stated), 1 - STATED)]
        return joined([(place, self._family(rows[place], alpha * share)) for place, share in parts])

    def _effects(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        found = self._fitted(1, SHARES[1]) if self.fraction else self._matched_effects()
        return levels_table(self.design, found), effects_table(self.design, found)

    def _fitted(self, axes: int, share: float) -> list[Effect]:
        """What a fractional design's model says of single axes, or of pairs of axes."""
        assert self.fraction is not None
        terms = [term for term in combinations(self.varied, axes)]
        alpha = divided(self.alpha * share, len(terms))
        found = []
        for term in terms:
            values = self.fraction.values(term)
            found.append(Effect(term, values, self.fraction.family(term, values, alpha, self.delta)))
        return found

    def _matched_effects(self) -> list[Effect]:
        """Differences between pairs of cells that differ in one axis only."""
        design = self.design
        averaged = {axis for axis, found in self.pairs.items() if len(found.cells) and not self._single_steps(found)}
        alpha = divided(self.alpha * SHARES[1], len(averaged))
        effects = []
        for axis, found in self.pairs.items():
            if axis not in averaged:
                codes = [tuple(value[0] * (a == axis) for a in range(len(design.axes))) for value in found.values]
                family = self.contrast_family.part(
                    np.asarray([self.contrast_of[code] for code in codes], dtype=np.intp)
                )
            elif self.lost:
                family = no_verdicts(len(found.values))
            else:
                family = self._family(self._rows(axis), alpha, joint=False)
            effects.append(Effect((axis,), found.values, family))
        return effects

    def _single_steps(self, found: Matched) -> bool:
        """Whether every pair has a baseline cell in it."""
        base = np.asarray(self.design.baseline, dtype=np.intp)[self.design.task]
        return bool(np.all(found.cells[:, 1] == base[found.cells[:, 1]]))

    def _interactions(self) -> pd.DataFrame:
        if self.fraction:
            return interactions_table(self.design, self._fitted(2, SHARES[2]) if self.fraction.pairs_fit else [])
        alpha = divided(self.alpha * SHARES[2], len(self.squares))
        found = [
            Effect(
                pair,
                each.values,
                no_verdicts(len(each.values)) if self.lost else self._family(self._rows(pair), alpha, joint=False),
            )
            for pair, each in self.squares.items()
        ]
        return interactions_table(self.design, found)

    def _best(self, means: Family) -> Best | None:
        cells = np.arange(self.design.cells, dtype=np.intp)
        if self.several:
            means = self._family(self._rows("means across"), self.alpha)
            cells = self._representatives(np.arange(len(self.configurations)))
        ranked = np.where(np.isfinite(means.low), means.estimate, np.nan)
        ranked = ranked if np.isfinite(ranked).any() else means.estimate
        if not np.isfinite(ranked).any():
            return None
        index = int(np.nanargmax(ranked) if self.higher else np.nanargmin(ranked))
        values = self.design.values[cells[index]]
        cell = {column: value for column, value in values.items() if not (self.several and column == TASK)}
        return Best(cell, float(means.estimate[index]), float(means.low[index]), float(means.high[index]))

    def _representatives(self, configurations: Indices) -> Indices:
        """The first cell of each configuration."""
        first = np.unique(self.configuration, return_index=True)[1]
        return np.asarray(first[configurations], dtype=np.intp)

    def _named(self, cells: Indices) -> pd.DataFrame:
        design = self.design
        rows = [design.values[cell] for cell in cells.tolist()]
        return pd.DataFrame(
            {column: pd.Series([row[column] for row in rows], dtype=object) for column in design.columns},
            index=range(len(rows)),
        )
