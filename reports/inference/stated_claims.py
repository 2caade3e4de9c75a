"""The differences that claims are about, each a mean over pairs of cells that are paired by seed, and the family of
them: variances, degrees of freedom and rules for lost runs are those of every other estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from klab.reports.inference.contrasts import Builder, all_squares, crossed_axes
from klab.reports.inference.design import Array, Design, Indices
from klab.reports.inference.error_rate import ALONE
from klab.reports.inference.family import Estimates, Family, independent_family
from klab.reports.inference.variance import estimate_components

Pairs = Sequence[tuple[int, int]]
"""Indices of cells of a design: the first of each is compared with the second."""


@dataclass(frozen=True)
class Differences:
    """``M`` estimates of one design.

    Attributes:
        estimate, error, freedom: ``[M]``, with NaN where the runs are missing, and in the latter two where nothing can
            be inferred.
        n: ``[M]``, the fewest seeds behind a pair.
        matches: ``[M]``, how many matches have runs.
        shrunk: whether the variance of a cell is drawn towards that of others: with more than two cells.
    """

    estimate: Array
    error: Array
    freedom: Array
    n: Indices
    matches: Indices
    shrunk: bool

    def only(self, row: int) -> Differences:
        """One of the estimates."""
        at = slice(row, row + 1)
        return Differences(
            self.estimate[at], self.error[at], self.freedom[at], self.n[at], self.matches[at], self.shrunk
        )


def differences(design: Design, rows: Sequence[Sequence[Pairs]], crossed: bool = True) -> Differences:
    """Of each row the mean over its matches of the mean difference of the match's pairs, within the seeds that both
    cells have; pairs whose runs are missing are left out.

    Args:
        rows: matches of pairs.
        crossed: whether seed × axis is told from the runs where the design crosses axes; not in a fractional one.
    """
    components = estimate_components(design, crossed_axes(design, all_squares(design) if crossed else {}))
    matches = [match for row in rows for match in row]
    pairs = [pair for match in matches for pair in match]
    if not pairs:
        nothing, none = np.full(len(rows), np.nan), np.zeros(len(rows), dtype=np.intp)
        return Differences(nothing, nothing, nothing, none, none, design.cells > 2)
    match_of, row_of = (
        np.repeat(np.arange(len(parts), dtype=np.intp), [len(part) for part in parts]) for parts in (matches, rows)
    )
    each = Builder(design).combine(np.asarray(pairs, dtype=np.intp), (1.0, -1.0)).averaged(match_of, len(matches))
    found = Estimates(each.averaged(row_of, len(rows)), design, components)
    known = np.bincount(row_of, each.known & (each.n >= 2), len(rows)).astype(np.intp)
    uncertain = found.uncertainty
    return Differences(found.estimate, uncertain.error, uncertain.freedom, found.n, known, design.cells > 2)


def claims_family(parts: Sequence[Differences], deltas: Array, alpha: float) -> Family:
    """All differences of all scores and tasks as one family, with a critical value by Šidák's inequality.

    Args:
        deltas: the margin of each difference, in the order of the parts; 0: none.
        alpha: the error rate of all of them together; a tenth of it covers that variances are shrunk, where they are.
    """
    estimate, error, freedom, n = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("estimate", "error", "freedom", "n")
    )
    level = alpha * ALONE if any(part.shrunk for part in parts) else alpha
    return independent_family(estimate, error, freedom, n, level, deltas)
