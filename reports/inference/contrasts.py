"""What is compared, as linear combinations of runs: cells with the baseline, values of an axis, pairs of axes.

Every combination is paired by seed: a difference of cells is the mean, over the seeds that all of them have, of the
difference within the seed. Cells that share fewer than two seeds but have two runs each are compared by their means
(then the variance between seeds enters). One seed gives an estimate from which nothing is inferred.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from klab.reports.inference.design import Array, Design, Flags, Indices

ROUNDING = 1e-11
"""Estimates and standard errors below this multiple of the largest score are 0."""


@dataclass(frozen=True)
class Combinations:
    """``M`` linear combinations of runs.

    Attributes:
        weights: ``[M, N]``.
        known: ``[M]``, whether the runs that it needs are there.
        n: ``[M]``, seeds (pairs) behind it; the fewest where it is an average.
    """

    weights: sparse.csr_matrix
    known: Flags
    n: Indices

    def averaged(self, owner: Indices, count: int) -> Combinations:
        """Means over the rows of each owner that at least two seeds stand behind."""
        use = self.known & (self.n >= 2)
        sizes = np.bincount(owner[use], minlength=count)
        share = 1.0 / np.maximum(sizes, 1)[owner[use]]
        mean = sparse.csr_matrix((share, (owner[use], np.flatnonzero(use))), shape=(count, owner.size))
        n = np.full(count, np.iinfo(np.intp).max, dtype=np.intp)
        np.minimum.at(n, owner[use], self.n[use])
        return Combinations((mean @ self.weights).tocsr(), sizes > 0, np.where(sizes > 0, n, 0))

    def only(self, kept: Flags) -> Combinations:
        """The same without the rows that are not `kept`."""
        return Combinations(self.weights, self.known & kept, np.where(kept, self.n, 0))


def stacked(parts: Sequence[Combinations]) -> Combinations:
    """All parts one below the other."""
    return Combinations(
        sparse.vstack([part.weights for part in parts]).tocsr(),
        np.concatenate([part.known for part in parts]),
        np.concatenate([part.n for part in parts]),
    )


class Builder:
    """Builds combinations from cells of one design."""

    def __init__(self, design: Design) -> None:
        self.runs = design.cell.size
        blocks = design.block_task.size
        self.run = np.full((design.cells, max(blocks, 1)), -1, dtype=np.intp)
        self.run[design.cell, design.block] = np.arange(self.runs)
        self.present: Flags = np.greater_equal(self.run, 0)
        self.n = self.present.sum(1)

    def combine(self, cells: Indices, signs: tuple[float, ...]) -> Combinations:
        """Σ_k signs[k]·mean(cells[:, k]), ``cells`` being ``[M, K]``; paired by seed where two seeds are shared."""
        present = self.present[cells]
        shared: Flags = np.all(present, axis=1)
        apart: Flags = np.logical_and(shared.sum(axis=1) < 2, np.min(present.sum(axis=2), axis=1) >= 2)
        used = np.where(apart[:, None, None], present, shared[:, None, :])
        counts = used.sum(2)
        known = (counts > 0).all(1)
        used &= known[:, None, None]
        row, part, block = np.nonzero(used)
        data = np.asarray(signs)[part] / counts[row, part]
        weights = sparse.csr_matrix((data, (row, self.run[cells[row, part], block])), shape=(len(cells), self.runs))
        return Combinations(weights, known, np.where(known, counts.min(1), 0))


def baseline_contrasts(design: Design, builder: Builder) -> tuple[Indices, Combinations]:
    """The cells other than the baselines, and each minus the baseline of its task."""
    base = np.asarray(design.baseline, dtype=np.intp)[design.task]
    others = np.flatnonzero(base != np.arange(design.cells))
    pairs = np.column_stack([others, base[others]])
    found = builder.combine(np.maximum(pairs, 0), (1.0, -1.0))
    known = found.known & (pairs[:, 1] >= 0)
    return others, Combinations(found.weights, known, np.where(known, found.n, 0))


@dataclass(frozen=True)
class Matched:
    """Groups of cells that differ in one or two axes only.

    Attributes:
        cells: ``[M, 2]`` (value, baseline's value) or ``[M, 4]`` (both changed, first, second, neither).
        owner: ``[M]``, the value (or pair of values) that each belongs to, an index into `values`.
        values: indices of levels, ``(value,)`` or ``(first, second)``.
    """

    cells: Indices
    owner: Indices
    values: tuple[tuple[int, ...], ...]


def matched_pairs(design: Design, axis: int) -> Matched:
    """All pairs of cells that differ in `axis` alone, one of them having the baseline's value there."""
    return _matched(design, (axis,))


def matched_squares(design: Design, first: int, second: int) -> Matched:
    """All squares of cells that differ in these two axes alone, with the baseline's values at one corner."""
    return _matched(design, (first, second))


def _matched(design: Design, axes: tuple[int, ...]) -> Matched:
    rest = np.column_stack([design.task[:, None], np.delete(design.codes, axes, axis=1)])
    families: dict[int, dict[tuple[int, ...], int]] = defaultdict(dict)
    _, family = np.unique(rest, axis=0, return_inverse=True)
    for cell, (group, key) in enumerate(zip(family.ravel().tolist(), design.codes[:, axes].tolist(), strict=True)):
        families[group][tuple(key)] = cell
    values: dict[tuple[int, ...], int] = {}
    cells: list[list[int]] = []
    owner: list[int] = []
    for members in families.values():
        for key, cell in members.items():
            if 0 in key:
                continue
            corners = [(0,)] if len(axes) == 1 else [(key[0], 0), (0, key[1]), (0, 0)]
            if all(corner in members for corner in corners):
                owner.append(values.setdefault(key, len(values)))
                cells.append([cell, *(members[corner] for corner in corners)])
    width = 2 ** len(axes)
    return Matched(np.asarray(cells, dtype=np.intp).reshape(-1, width), np.asarray(owner, dtype=np.intp), tuple(values))


def all_squares(design: Design) -> dict[tuple[int, int], Matched]:
    """The squares of every pair of axes; empty ones where the design never changes both."""
    return {pair: matched_squares(design, *pair) for pair in combinations(range(len(design.axes)), 2)}


def crossed_axes(design: Design, squares: dict[tuple[int, int], Matched]) -> NDArray[np.bool_]:
    """``[A]``, the axes that are crossed with at least one other."""
    crossed = np.zeros(len(design.axes), dtype=bool)
    for pair, found in squares.items():
        if len(found.cells):
            crossed[list(pair)] = True
    return crossed


def values_of(combinations: Combinations, design: Design) -> Array:
    """``[M]``, the estimates; NaN where the runs are missing. What rounding leaves of equal scores is 0."""
    estimate = np.asarray(combinations.weights @ design.score, dtype=np.float64)
    noise = ROUNDING * float(np.max(np.abs(design.score), initial=0.0))
    return np.where(combinations.known, np.where(np.abs(estimate) <= noise, 0.0, estimate), np.nan)
