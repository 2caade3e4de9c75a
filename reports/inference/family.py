"""Families of estimates: simultaneous intervals, adjusted p and the verdict of each, from one critical value.

An estimate has p < ALPHA exactly when its interval excludes 0, and then the verdict is "differs"; otherwise it is
"equivalent" when the interval lies within ±delta, and "undecided" when not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from klab.reports.inference.contrasts import Combinations, values_of
from klab.reports.inference.design import Array, Design, Indices
from klab.reports.inference.error_rate import ALPHA
from klab.reports.inference.uncertainty import critical_values, quantile, tail, uncertainty
from klab.reports.inference.variance import Components

DIFFERS, EQUIVALENT, UNDECIDED = "differs", "equivalent", "undecided"


@dataclass(frozen=True)
class Family:
    """``M`` estimates with one error rate.

    Attributes:
        estimate, low, high: NaN where the runs are missing; the ends NaN also where nothing can be inferred.
        p: adjusted for the whole family, scaled so that `ALPHA` is the threshold.
        n: seeds behind each.
        verdict: one of the three words.
        more: further seeds per cell that would decide if the estimates stayed as they are; NaN where decided or
            where none would.
    """

    estimate: Array
    low: Array
    high: Array
    p: Array
    n: Indices
    verdict: NDArray[np.object_]
    more: Array

    def part(self, rows: slice | Indices) -> Family:
        """Some of its members."""
        return Family(
            self.estimate[rows],
            self.low[rows],
            self.high[rows],
            self.p[rows],
            self.n[rows],
            self.verdict[rows],
            self.more[rows],
        )


def joined(parts: Sequence[tuple[Indices, Family]]) -> Family:
    """One table of the members of several families, each with its places in it."""
    order = np.argsort(np.concatenate([places for places, _ in parts]), kind="stable")
    families = [family for _, family in parts]
    columns = [np.concatenate([getattr(family, each.name) for family in families])[order] for each in fields(Family)]
    return Family(*columns)


def no_verdicts(count: int) -> Family:
    """Estimates of which nothing is said."""
    nan = np.full(count, np.nan)
    return Family(nan, nan, nan, nan, np.zeros(count, dtype=np.intp), np.full(count, UNDECIDED, dtype=object), nan)


class Estimates:
    """All estimates of a study with their standard errors, from which families are taken."""

    def __init__(self, combinations: Combinations, design: Design, components: Components) -> None:
        self.estimate = values_of(combinations, design)
        self.n = combinations.n
        self.uncertainty = uncertainty(combinations, design, components)

    def family(self, rows: Indices, alpha: float, delta: float, joint: bool = True) -> Family:
        """Intervals and verdicts of the estimates `rows`, with the error rate `alpha` for all of them.

        Args:
            joint: find the critical values from the joint distribution; otherwise by Šidák's inequality, which needs
                no simulation and is conservative.
        """
        found = self.uncertainty
        error, freedom = found.error[rows], found.freedom[rows]
        estimate, n = self.estimate[rows], self.n[rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            statistic = np.where(error > 0, estimate / error, np.where(estimate == 0, 0.0, np.inf))
        testable = np.isfinite(error) & np.isfinite(estimate)
        random = np.flatnonzero(testable & (error > 0))
        count = estimate.size
        freedom = np.where(testable, freedom, np.nan)
        bound = quantile(-np.expm1(np.log1p(-alpha) / max(count, 1)), freedom)
        if joint and random.size > 1:
            order = random[np.lexsort((error[random], -statistic[random]))]
            # Estimates whose runs are missing stay in the family: losing one makes the others no more certain.
            bound[order] = critical_values(found, rows[order], _without_lost(alpha, random.size, count))
        return judged(estimate, error, freedom, n, bound, alpha, delta)


def independent_family(
    estimate: Array, error: Array, freedom: Array, n: Indices, alpha: float, delta: float | Array
) -> Family:
    """A family of estimates whose dependence is not known, with a critical value by Šidák's inequality.

    Args:
        delta: the margin of all, or of each; 0: none is small enough to count as none.
    """
    bound = quantile(-np.expm1(np.log1p(-alpha) / max(estimate.size, 1)), freedom)
    return judged(estimate, error, freedom, n, bound, alpha, delta)


def judged(
    estimate: Array, error: Array, freedom: Array, n: Indices, bound: Array, alpha: float, delta: float | Array
) -> Family:
    """Intervals, p and verdicts of estimates with the critical values `bound` of |t|.

    Args:
        estimate, error, freedom: ``[M]``; where the error is NaN, nothing is said.
        n: seeds behind each estimate.
        alpha: the error rate of the whole family.
        delta: differences smaller than this count as none; of all, or of each.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(error > 0, estimate / error, np.where(estimate == 0, 0.0, np.inf))
    testable = np.isfinite(error) & np.isfinite(estimate)
    level = tail(bound, freedom)
    half = np.where(error > 0, bound * error, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Šidák's formula with the number of independent tests that would have the family's critical value.
        tests = np.log1p(-alpha) / np.log1p(-level)
        single = np.minimum(tail(statistic, freedom), 1.0)
        p = np.minimum(-np.expm1(tests * np.log1p(-single)) * (ALPHA / alpha), 1.0)
    # The interval is the judge, so that rounding cannot part it from p.
    excludes = testable & (np.abs(estimate) > half)
    p = np.where(excludes, np.minimum(p, np.nextafter(ALPHA, 0)), np.maximum(p, ALPHA))
    p = np.where(testable, p, np.nan)
    low, high = estimate - half, estimate + half
    low, high = np.where(testable, low, np.nan), np.where(testable, high, np.nan)
    inside = testable & (low > -delta) & (high < delta)
    verdict = np.where(excludes, DIFFERS, np.where(inside, EQUIVALENT, UNDECIDED)).astype(object)
    more = _more_seeds(estimate, error, freedom, n, level, delta)
    return Family(estimate, low, high, p, n, verdict, np.where(testable & (verdict == UNDECIDED), more, np.nan))


def _without_lost(alpha: float, known: int, count: int) -> float:
    """The error rate of the known members of a family of `count`, the same for each as if all were known."""
    return float(-np.expm1(np.log1p(-alpha) * known / count))


def _more_seeds(estimate: Array, error: Array, freedom: Array, n: Indices, level: Array, delta: float | Array) -> Array:
    """Further seeds until the interval, at the present estimate, variance and family, excludes 0 or fits ±delta."""
    size = np.abs(estimate)
    target = np.maximum(size, delta - size)
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = np.asarray(n, dtype=np.float64)
        for _ in range(8):
            grown = np.maximum(freedom * np.maximum(needed - 1, 1) / np.maximum(n - 1, 1), 1.0)
            needed = n * (quantile(level, grown) * error / target) ** 2
        more = np.ceil(needed - n)
    return np.where(np.isfinite(more) & (target > 0), np.maximum(more, 1.0), np.nan)
