"""Learning curves as arrays: which cells stand for a value of an axis, and their mean and interval over seeds."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from klab.reports.axes import VariedAxis
from klab.reports.comparison import Comparison
from klab.reports.statistics import Array
from klab.reports.study import Study


class Cube(NamedTuple):
    """One quantity of every cell of a task: `values` is `[groups, seeds, updates]`, NaN where nothing was measured."""

    updates: NDArray[np.int64]
    values: Array


class Curve(NamedTuple):
    """Mean over seeds with its 95% t-interval (NaN for one seed), and how many seeds are present, `[updates]`."""

    updates: NDArray[np.int64]
    mean: Array
    low: Array
    high: Array
    n: NDArray[np.int64]


def cube(study: Study, comparison: Comparison, frame: pd.DataFrame, column: str) -> Cube:
    """`column` of `frame` (metrics or evaluations) for the groups and seeds of a comparison."""
    cells = study.cells[study.cells["task"] == comparison.task]
    row = {group: i for i, group in enumerate(comparison.groups)}
    position = {seed: i for i, seed in enumerate(comparison.seeds)}
    categories = frame["cell"].cat.categories
    places = {
        identity: (row[group], position[seed])
        for identity, group, seed in zip(cells["cell"], cells["group"], cells["seed"], strict=True)
    }
    lookup = np.asarray([places.get(identity, (-1, -1)) for identity in categories], dtype=np.int64).reshape(-1, 2)
    codes = frame["cell"].cat.codes.to_numpy()
    at = lookup[codes] if len(categories) else np.empty((0, 2), dtype=np.int64)
    mine = at[:, 0] >= 0
    updates, index = np.unique(frame["update"].to_numpy()[mine], return_inverse=True)
    values = np.full((len(comparison.groups), len(comparison.seeds), updates.size), np.nan)
    if column in frame:
        values[at[mine, 0], at[mine, 1], index] = frame[column].to_numpy(dtype=np.float64)[mine]
    return Cube(updates, values)


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


def over_seeds(updates: NDArray[np.int64], by_seed: Array, level: float = 0.95) -> Curve:
    """Mean and t-interval of `[seeds, updates]`, over the seeds that are present at each update."""
    present = np.isfinite(by_seed)
    n = present.sum(0)
    n = np.where(
        n < np.maximum.accumulate(n[::-1])[::-1], 0, n
    )  # a last evaluation of a lost seed, between the others' ones
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(n > 0, np.where(present, by_seed, 0.0).sum(0) / n, np.nan)
        spread = np.where(present, (by_seed - mean) ** 2, 0.0).sum(0)
        deviation = np.where(n > 1, np.sqrt(spread / (n - 1)), np.nan)
        quantile = np.asarray([_quantile(level, int(count) - 1) for count in range(int(n.max(initial=0)) + 1)])
        half = quantile[n] * deviation / np.sqrt(n)
    kept = n > 0
    return Curve(updates[kept], mean[kept], (mean - half)[kept], (mean + half)[kept], n[kept])


@lru_cache(maxsize=1024)
def _quantile(level: float, freedom: int) -> float:
    return float(stats.t.ppf(0.5 + level / 2, freedom)) if freedom > 0 else float("nan")


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
