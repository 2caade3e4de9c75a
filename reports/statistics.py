"""Statistics that describe curves and runs, as short functions of arrays; what is inferred is in `inference`.

The unit is the training seed. ``scores_rt`` is ``[runs, tasks]``; NaN is a missing seed.

Sources: Student (1908); Agarwal et al. (2021), *Deep reinforcement learning at the edge of the statistical precipice*
    (interquartile mean, optimality gap).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate, the ends of its interval (NaN when there is none) and the number of seeds behind it."""

    estimate: float
    low: float
    high: float
    n: int


def finite(values: Sequence[float] | Array) -> Array:
    """The finite entries, flat, as float64."""
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]


def t_interval(values: Sequence[float] | Array, level: float = 0.95) -> Interval:
    """Mean over seeds with Student's t-interval; one seed has a mean and no interval, no seed has neither."""
    x = finite(values)
    if x.size == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    if x.size == 1:
        return Interval(float(x[0]), np.nan, np.nan, 1)
    half = float(stats.t.ppf(0.5 + level / 2, x.size - 1)) * float(x.std(ddof=1)) / np.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), int(x.size))


def interquartile_mean(scores_rt: Array) -> float:
    """Mean of the middle half of all runs of all tasks (25% trimmed from either end)."""
    return float(stats.trim_mean(finite(scores_rt), 0.25))


def optimality_gap(scores_rt: Array, target: float = 1.0) -> float:
    """Mean shortfall from `target`; scores above the target count as the target."""
    return float(np.mean(np.maximum(target - finite(scores_rt), 0.0)))
