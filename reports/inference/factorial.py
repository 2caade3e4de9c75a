"""The model of a fractional design: the score as a sum of effects of axes and of pairs of axes.

Coefficients belong to contrasts between the values of an axis that add up to zero and have mean square 1 over them; a
pair of axes has the products. An effect of an axis is hence its mean over all values of the other axes.

Source: Montgomery, Design and Analysis of Experiments, chapters 5 and 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Term = tuple[int, ...]
"""The axes of an effect: one, or two in increasing order."""

LEAST_FREEDOM = 10
"""Cells beyond the number of coefficients without which pairs of axes are left out of the model."""


@dataclass(frozen=True)
class Model:
    """Columns of a linear model for `C` cells.

    Attributes:
        matrix: ``[C, P]``; the first column is the constant.
        places: by term, its columns.
        contrasts: per axis, ``[levels, levels − 1]``, what stands in the columns of its effect.
    """

    matrix: Array
    places: dict[Term, slice]
    contrasts: tuple[Array, ...]

    @property
    def columns(self) -> int:
        return int(self.matrix.shape[1])

    def row(self, codes: Sequence[int]) -> Array:
        """``[P]``, the row of the cell with these values."""
        own = [contrast[code] for contrast, code in zip(self.contrasts, codes, strict=True)]
        parts = [np.ones(1)]
        for term in self.places:
            parts.append(own[term[0]] if len(term) == 1 else np.outer(own[term[0]], own[term[1]]).ravel())
        return np.concatenate(parts)


def model_of(codes: Indices, levels: Sequence[int], pairs: bool) -> Model:
    """The model of the cells with these values (``[C, A]``), with one term per axis, and per pair of axes if wanted."""
    contrasts = tuple(_contrasts(count) for count in levels)
    own = [contrast[codes[:, axis]] for axis, contrast in enumerate(contrasts)]
    acting = [axis for axis, count in enumerate(levels) if count > 1]
    columns: list[tuple[Term, Array]] = [((axis,), own[axis]) for axis in acting]
    if pairs:
        columns += [
            ((a, b), (own[a][:, :, None] * own[b][:, None, :]).reshape(len(codes), -1))
            for a, b in combinations(acting, 2)
        ]
    places, start = {}, 1
    for term, values in columns:
        places[term] = slice(start, start + values.shape[1])
        start += values.shape[1]
    matrix = np.hstack([np.ones((len(codes), 1)), *(values for _, values in columns)])
    return Model(matrix, places, contrasts)


def _contrasts(levels: int) -> Array:
    """Helmert's contrasts, orthogonal to each other and to a constant, with mean square 1."""
    table = np.zeros((levels, levels - 1))
    for column in range(levels - 1):
        table[: column + 1, column] = -1.0
        table[column + 1, column] = column + 1.0
    return table / np.sqrt(np.mean(table**2, axis=0)) if levels > 1 else table


@dataclass(frozen=True)
class Resolution:
    """What a choice of cells can tell apart.

    Attributes:
        cells: how many there are.
        main, pairs: coefficients of the model without, and with, pairs of axes.
        fits_main, fits_pairs: whether all of those can be estimated, with `LEAST_FREEDOM` cells to spare.
        efficiency: of the model that fits, the D-efficiency relative to the product of all values: 1 if the estimates
            are as exact, per cell, as there; 0 where not even effects of single axes can be estimated.
        alias: the largest part of an effect of the next order (a pair, or a triple) that an estimate contains, by
            root mean square over the coefficients of the pair of terms.
        alias_terms: the two terms: the estimated one, and the one that leaks into it.
    """

    cells: int
    main: int
    pairs: int
    fits_main: bool
    fits_pairs: bool
    efficiency: float
    alias: float
    alias_terms: tuple[Term, Term] | None


def resolution(codes: Indices, levels: Sequence[int]) -> Resolution:
    """What these cells (``[C, A]``, values by number) can tell apart; ``levels`` counts the values of each axis."""
    main, pairs = model_of(codes, levels, False), model_of(codes, levels, True)
    fits_main, fits_pairs = fits(main), fits(pairs)
    if not fits_main:
        return Resolution(len(codes), main.columns, pairs.columns, False, False, 0.0, np.nan, None)
    model = pairs if fits_pairs else main
    sign, logarithm = np.linalg.slogdet(model.matrix.T @ model.matrix / len(codes))
    efficiency = float(np.exp(logarithm / model.columns)) if sign > 0 else 0.0
    worst, terms = _worst_alias(model, codes, levels)
    return Resolution(len(codes), main.columns, pairs.columns, True, fits_pairs, efficiency, worst, terms)


def fits(model: Model) -> bool:
    """Whether every coefficient can be estimated, and enough cells are left over to say how exactly."""
    cells, columns = model.matrix.shape
    return bool(cells >= columns + LEAST_FREEDOM and int(np.linalg.matrix_rank(model.matrix)) == columns)


def _worst_alias(model: Model, codes: Indices, levels: Sequence[int]) -> tuple[float, tuple[Term, Term] | None]:
    """Of the terms of the next order, the one whose neglect biases some estimate most."""
    order = 1 + max(len(term) for term in model.places)
    acting = [axis for axis, count in enumerate(levels) if count > 1]
    own = [contrast[codes[:, axis]] for axis, contrast in enumerate(model.contrasts)]
    solve = np.linalg.pinv(model.matrix)
    worst, found = 0.0, None
    for term in combinations(acting, order):
        columns = own[term[0]]
        for axis in term[1:]:
            columns = (columns[:, :, None] * own[axis][:, None, :]).reshape(len(codes), -1)
        leaks = solve @ columns
        for estimated, place in model.places.items():
            size = float(np.sqrt(np.mean(leaks[place] ** 2)))
            if size > worst:
                worst, found = size, (estimated, term)
    return worst, found
