"""Statistics of a comparison, as short functions of arrays.

The unit is the **training seed**: one number per (cell, seed), never one per prompt or per update. Arrays are named
by their axes (``scores_rt`` is ``[runs, tasks]``, ``scores_cs`` is ``[cells, seeds]``); NaN is a missing seed.
Nothing here reads a file.

Sources: Student (1908); Fisher (1935) for sign flips; Holm (1979); Tukey (1953) and Kramer (1956); Agarwal et al.
    (2021), *Deep reinforcement learning at the edge of the statistical precipice* (interquartile mean, stratified
    bootstrap, performance profiles, probability of improvement, optimality gap); Henderson et al. (2018) and Colas et
    al. (2018) on why few seeds mislead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Statistic = Callable[[Array], float]

EXACT_FLIPS = 14
"""Up to this many pairs all 2^n sign flips are enumerated; beyond, 20,000 are drawn."""


class Interval(NamedTuple):
    """An estimate, the ends of its interval (NaN when there is none) and the number of seeds behind it."""

    estimate: float
    low: float
    high: float
    n: int


class Contrast(NamedTuple):
    """A paired difference: estimate, interval, p of the sign-flip test and the number of pairs."""

    estimate: float
    low: float
    high: float
    p: float
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


def probability_of_improvement(x_rt: Array, y_rt: Array) -> float:
    """Mean over tasks of P(X > Y) + P(X = Y)/2, X and Y being single runs (Mann-Whitney)."""
    x, y = np.atleast_2d(x_rt), np.atleast_2d(y_rt)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} tasks and y has {y.shape[1]}")
    wins = [np.mean(np.sign(finite(x[:, t])[:, None] - finite(y[:, t])[None, :])) for t in range(x.shape[1])]
    return float(0.5 + np.mean(wins) / 2)


def performance_profile(scores_rt: Array, thresholds: Array) -> Array:
    """Share of runs whose score is above each threshold, `[thresholds]`."""
    return np.asarray([np.mean(finite(scores_rt) > threshold) for threshold in thresholds], dtype=np.float64)


def bootstrap_interval(
    scores_rt: Array, statistic: Statistic, level: float = 0.95, replicates: int = 2000, seed: int = 0
) -> Interval:
    """Percentile interval of `statistic` when runs are resampled within each task (stratified bootstrap).

    Needs at least 5 runs x 3 tasks (`enough_for_bootstrap`); with less the interval is NaN, because its coverage
    would be a fiction.
    """
    scores = np.atleast_2d(np.asarray(scores_rt, dtype=np.float64))
    runs, tasks = scores.shape
    if not enough_for_bootstrap(scores):
        return Interval(statistic(scores), np.nan, np.nan, runs)
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, runs, size=(replicates, runs, tasks))
    values = [statistic(np.take_along_axis(scores, rows, axis=0)) for rows in draws]
    low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(statistic(scores), float(low), float(high), runs)


def enough_for_bootstrap(scores_rt: Array) -> bool:
    """Whether every one of at least 3 tasks has at least 5 finished runs."""
    scores = np.atleast_2d(scores_rt)
    return scores.shape[0] >= 5 and scores.shape[1] >= 3 and bool(np.isfinite(scores).all())


def sign_flip_p(differences: Sequence[float] | Array, seed: int = 0, draws: int = 20_000) -> float:
    """Two-sided p of "the paired differences are symmetric about 0": share of sign flips with a mean at least as far
    from 0.

    Exact up to `EXACT_FLIPS` pairs. With n pairs no p below 2^(1-n) exists: three seeds cannot give less than 0.25.
    """
    d = finite(differences)
    if d.size == 0:
        return float("nan")
    if d.size <= EXACT_FLIPS:
        bits = np.arange(2**d.size)[:, None] >> np.arange(d.size) & 1
        sums = np.abs((1 - 2 * bits) @ d)
        return float(np.mean(sums >= abs(d.sum()) - 1e-12 * np.abs(d).sum()))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, d.size))
    hits = np.sum(np.abs(signs @ d) >= abs(d.sum()) - 1e-12 * np.abs(d).sum())
    return float((hits + 1) / (draws + 1))


def paired_contrast(x_s: Array, y_s: Array, level: float = 0.95) -> Contrast:
    """x - y over the seeds that both have: mean difference, t-interval of the differences, sign-flip p, number of
    pairs.
    """
    d = finite(np.asarray(x_s, dtype=np.float64) - np.asarray(y_s, dtype=np.float64))
    interval = t_interval(d, level)
    return Contrast(interval.estimate, interval.low, interval.high, sign_flip_p(d), interval.n)


def paired_p(x_s: Array, y_s: Array) -> float:
    """p of Student's paired t-test; NaN below two pairs; 1 when every difference is 0, 0 when all are one other
    number.
    """
    d = finite(np.asarray(x_s, dtype=np.float64) - np.asarray(y_s, dtype=np.float64))
    if d.size < 2:
        return float("nan")
    spread = d.std(ddof=1)
    if spread <= 1e-12 * max(np.abs(d).max(), 1e-300):
        return 1.0 if np.abs(d).max() == 0 else 0.0
    return float(2 * stats.t.sf(abs(d.mean()) / (spread / np.sqrt(d.size)), d.size - 1))


def holm(p_values: Sequence[float] | Array) -> Array:
    """Holm's adjusted p of a family of tests (monotone, at most 1); NaN stays NaN and is not counted."""
    p = np.asarray(p_values, dtype=np.float64)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(order.size, 0, -1)), 1.0)
    return adjusted


def block_error(scores_cs: Array) -> tuple[float, int]:
    """Error variance and its degrees of freedom of the additive model score = cell + seed, over the present entries.

    This is the pure error of the design: what is left when every cell has its own mean and every seed its own shift.
    """
    scores = np.asarray(scores_cs, dtype=np.float64)
    present = np.isfinite(scores)
    scores, present = scores[present.any(1)], present[present.any(1)]
    if not scores.size:
        return float("nan"), 0
    system, shift = _seed_system(scores)
    residual = np.where(present, scores - shift, np.nan)
    residual = (residual - np.nanmean(residual, axis=1, keepdims=True))[present]
    freedom = int(present.sum() - len(scores) - np.linalg.matrix_rank(system, hermitian=True))
    return (float(residual @ residual / freedom) if freedom > 0 else float("nan")), freedom


def seed_shifts(scores_cs: Array) -> Array:
    """How much each seed lies above the average seed in the additive model score = cell + seed, `[seeds]`."""
    scores = np.asarray(scores_cs, dtype=np.float64)
    return _seed_system(scores[np.isfinite(scores).any(1)])[1]


def _seed_system(scores: Array) -> tuple[Array, Array]:
    # The cells' means are eliminated, which leaves a small system in the seeds: a thousand cells cost no thousand
    # columns.
    present = np.isfinite(scores).astype(np.float64)
    shares = present / np.maximum(present.sum(1, keepdims=True), 1.0)
    system = np.diag(present.sum(0)) - present.T @ shares
    filled = np.nan_to_num(scores)
    moment = (present * (filled - (shares * filled).sum(1, keepdims=True))).sum(0)
    return system, np.asarray(np.linalg.pinv(system, hermitian=True) @ moment, dtype=np.float64)


def critical_difference(scores_cs: Array, level: float = 0.95) -> float:
    """Smallest difference of two cell means that Tukey's test (seeds as blocks) calls significant, over all pairs at
    once.

    Cells with missing seeds enter through the harmonic mean of the seed counts (Tukey-Kramer). NaN without replication.
    """
    scores = np.asarray(scores_cs, dtype=np.float64)
    counts = np.isfinite(scores).sum(1)
    counts = counts[counts > 0]
    variance, freedom = block_error(scores)
    if freedom <= 0 or counts.size < 2:
        return float("nan")
    return _studentized_range(level, counts.size, freedom) * float(np.sqrt(variance * np.mean(1.0 / counts)))


@lru_cache(maxsize=256)
def _studentized_range(level: float, means: int, freedom: int) -> float:
    # scipy integrates twice for every call: half a second.
    return float(stats.studentized_range.ppf(level, means, freedom))


def critical_groups(means_c: Array, difference: float) -> list[tuple[int, int]]:
    """Maximal runs `(first, last)` of cells ranked from best to worst whose means lie within `difference` of each
    other.
    """
    means = np.asarray(means_c, dtype=np.float64)
    groups: list[tuple[int, int]] = []
    for first in range(means.size):
        last = (
            int(np.flatnonzero(means[first] - means <= difference)[-1]) if np.isfinite(difference) else means.size - 1
        )
        if not groups or last > groups[-1][1]:
            groups.append((first, last))
    return groups
