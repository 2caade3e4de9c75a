"""Learning curves as arrays: which cells stand for a value of an axis, and their mean and interval over seeds.

A curve is a mean over the same runs from its first point to its last, so that no run that ends can make it jump. Runs
that diverged or were stopped stay in it at their last measured value. Runs that failed or have not ended are left out;
where no run has ended, the curve ends with the run that is behind.
"""

from __future__ import annotations

from functools import lru_cache, reduce
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from klab.reports.axes import VariedAxis
from klab.reports.comparison import Comparison
from klab.reports.statistics import Array
from klab.reports.study import Study

Flags = NDArray[np.bool_]


class Cube(NamedTuple):
    """One quantity of every cell of a task: `values` is `[groups, seeds, updates]`, NaN where nothing was measured."""

    updates: NDArray[np.int64]
    values: Array


class RunStates(NamedTuple):
    """Of every run of a task, `[groups, seeds]`: whether it has a result, and whether it diverged or was stopped."""

    ended: Flags
    cut: Flags


class Curve(NamedTuple):
    """A mean over runs with its pointwise 95% t-interval over seeds (NaN for one seed).

    Attributes:
        updates: `[points]`.
        mean, low, high: `[points]`.
        kept: `[groups, seeds]`, the runs in the mean.
        ends: for each of them that was cut before the last point, the update from which it is held.
    """

    updates: NDArray[np.int64]
    mean: Array
    low: Array
    high: Array
    kept: Flags
    ends: NDArray[np.int64]

    @property
    def runs(self) -> int:
        return int(self.kept.sum())


def cube(study: Study, comparison: Comparison, frame: pd.DataFrame, column: str) -> Cube:
    """`column` of `frame` (metrics or evaluations) for the groups and seeds of a comparison."""
    places = _places(study, comparison)
    categories = frame["cell"].cat.categories
    lookup = np.asarray([places.get(identity, (-1, -1)) for identity in categories], dtype=np.int64).reshape(-1, 2)
    codes = frame["cell"].cat.codes.to_numpy()
    at = lookup[codes] if len(categories) else np.empty((0, 2), dtype=np.int64)
    mine = at[:, 0] >= 0
    updates, index = np.unique(frame["update"].to_numpy()[mine], return_inverse=True)
    values = np.full((len(comparison.groups), len(comparison.seeds), updates.size), np.nan)
    if column in frame:
        values[at[mine, 0], at[mine, 1], index] = frame[column].to_numpy(dtype=np.float64)[mine]
    return Cube(updates, values)


def run_states(study: Study, comparison: Comparison) -> RunStates:
    """What became of the runs of a task."""
    shape = (len(comparison.groups), len(comparison.seeds))
    states = RunStates(np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_))
    places = _places(study, comparison)
    cells = study.cells[study.cells["task"] == comparison.task]
    for identity, state in zip(cells["cell"], cells["state"], strict=True):
        states.ended[places[identity]] = state in ("finished", "diverged", "stopped")
        states.cut[places[identity]] = state in ("diverged", "stopped")
    return states


def _places(study: Study, comparison: Comparison) -> dict[str, tuple[int, int]]:
    cells = study.cells[study.cells["task"] == comparison.task]
    row = {group: i for i, group in enumerate(comparison.groups)}
    position = {seed: i for i, seed in enumerate(comparison.seeds)}
    return {
        identity: (row[group], position[seed])
        for identity, group, seed in zip(cells["cell"], cells["group"], cells["seed"], strict=True)
    }


def smoothed(values: Array, window: int) -> Array:
    """Centred moving average over the last axis; NaN entries are skipped and stay NaN."""
    if window <= 1:
        return values
    present = np.isfinite(values)
    half = window // 2
    size = values.shape[-1]
    low = np.maximum(np.arange(size) - half, 0)
    high = np.minimum(np.arange(size) + half + 1, size)
    pad = [(0, 0)] * (values.ndim - 1) + [(1, 0)]
    total = np.pad(np.cumsum(np.where(present, values, 0.0), axis=-1), pad)
    count = np.pad(np.cumsum(present, axis=-1), pad)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (total[..., high] - total[..., low]) / (count[..., high] - count[..., low])
    return np.where(present, mean, np.nan)


def filled(updates: NDArray[np.int64], values: Array, held: Flags) -> Array:
    """`[runs, updates]` with a straight line between the measurements of a run, and the last one kept where `held`."""
    result = values.copy()
    for row in np.flatnonzero(~np.isfinite(values).all(axis=1)):
        known = np.flatnonzero(np.isfinite(values[row]))
        if known.size:
            end = len(updates) if held[row] else known[-1] + 1
            inside = updates[known[0] : end]
            result[row, known[0] : end] = np.interp(inside, updates[known], values[row, known])
    return result


def mean_curve(data: Cube, states: RunStates, groups: list[int], level: float = 0.95) -> Curve | None:
    """The mean over runs of `groups`; None where nothing was measured. See the module for which runs count.

    The interval is that of the seeds' means over the groups.
    """
    values = data.values[groups]
    shape = values.shape[:2]
    measured = np.isfinite(values).any(axis=2)
    ended = states.ended[groups] & measured
    kept = ended if ended.any() else measured
    if not kept.any():
        return None
    cut = states.cut[groups] & kept
    runs, lost = values[kept], cut[kept]
    going = ~lost if not lost.all() else lost
    columns = np.flatnonzero(np.isfinite(runs[going]).any(axis=0))
    updates = data.updates[columns]
    lines = filled(data.updates, runs, lost)[:, columns]
    whole = np.isfinite(lines).all(axis=0)
    if not whole.any():
        return None
    updates, lines = updates[whole], lines[:, whole]
    last = np.asarray([data.updates[np.flatnonzero(np.isfinite(run))[-1]] for run in runs[lost]], dtype=np.int64)
    full = np.full((*shape, updates.size), np.nan)
    full[kept] = lines
    by_seed = average(full, 0)
    mean, half = _interval(by_seed[np.isfinite(by_seed).all(axis=1)], level)
    spread = np.zeros((len(data.values), shape[1]), dtype=np.bool_)
    spread[groups] = kept
    return Curve(updates, mean, mean - half, mean + half, spread, last[last < updates[-1]])


def root(data: Cube) -> Cube:
    """The square root of every measurement, 0 where an estimate of what is positive fell below."""
    return Cube(data.updates, np.sqrt(np.maximum(data.values, 0.0)))


def at_common_updates(*curves: Curve | None) -> list[Curve]:
    """The curves at the updates that all of them have; none where one is missing, or they share no update."""
    known = [curve for curve in curves if curve is not None]
    if len(known) < len(curves):
        return []
    common = reduce(np.intersect1d, [curve.updates for curve in known])
    return [_at(curve, common) for curve in known] if common.size else []


def _at(curve: Curve, updates: NDArray[np.int64]) -> Curve:
    chosen = np.searchsorted(curve.updates, updates)
    return curve._replace(updates=updates, mean=curve.mean[chosen], low=curve.low[chosen], high=curve.high[chosen])


def _interval(by_seed: Array, level: float) -> tuple[Array, Array]:
    n = len(by_seed)
    mean = by_seed.mean(axis=0)
    if n < 2:
        return mean, np.full(mean.shape, np.nan)
    return mean, _quantile(level, n - 1) * by_seed.std(axis=0, ddof=1) / np.sqrt(n)


@lru_cache(maxsize=1024)
def _quantile(level: float, freedom: int) -> float:
    return float(stats.t.ppf(0.5 + level / 2, freedom))


def average(values: Array, axis: int) -> Array:
    """Mean over the present entries, NaN where there is none, without warnings."""
    present = np.isfinite(values)
    count = present.sum(axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, np.where(present, values, 0.0).sum(axis) / count, np.nan)


def representatives(study: Study, comparison: Comparison, axis: VariedAxis) -> list[tuple[str, list[int]]]:
    """For each value of `axis`, in order, the groups (positions in the comparison) that show it.

    In a product of axes these are all groups with the value; otherwise the groups that differ from the baseline on
    this axis only, or all groups with the value where there is no baseline.
    """
    base = study.values[comparison.baseline] if comparison.baseline else None
    found = []
    for value in axis.values:
        groups = [i for i, group in enumerate(comparison.groups) if study.values[group][axis.key] == value]
        if not study.factorial and base is not None:
            groups = [i for i in groups if _differs_only(study.values[comparison.groups[i]], base, axis.key)]
        if groups:
            found.append((value, groups))
    return found


def _differs_only(row: object, base: object, key: str) -> bool:
    assert isinstance(row, dict)
    assert isinstance(base, dict)
    return all(row[other] in (None, base[other]) for other in row if other != key)
