"""What stands on the horizontal axis of a curve: updates, tokens or samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from klab.grid import UserError
from klab.reports.comparison import Comparison
from klab.reports.figures.series import Cube, Curve, RunStates, cube, filled
from klab.reports.statistics import Array
from klab.reports.study import Study

UPDATES = "updates"

UNITS = {
    UPDATES: "optimizer updates",
    "tokens": "own tokens in updates",
    "samples": "completions sampled",
}
"""By name, what is counted. A token counts again in each update that uses it, a drawn one that none uses once."""


def parse_units(names: Sequence[str], key: str = "over") -> tuple[str, ...]:
    """Units without repetition; updates where none is named.

    Raises:
        UserError: for a unit that does not exist.
    """
    for name in names:
        if name not in UNITS:
            raise UserError("unknown unit of effort", key=key, value=name, allowed=list(UNITS))
    return tuple(dict.fromkeys(names)) or (UPDATES,)


def efforts(study: Study, comparison: Comparison) -> dict[str, Cube]:
    """Of every run, the tokens and the samples up to each update, from update 0."""
    tokens = cube(study, comparison, study.metrics, "tokens")
    rollout = cube(study, comparison, study.metrics, "rollout").values
    drawn = cube(study, comparison, study.metrics, "sampled_groups").values
    unused = np.nan_to_num(cube(study, comparison, study.metrics, "unused_tokens").values)
    first = np.diff(rollout, axis=2, prepend=-1.0) > 0
    settings = [study.configurations[group].training for group in comparison.groups]
    prompts = np.asarray([each.prompts for each in settings], dtype=np.float64)[:, None, None]
    size = np.asarray([each.group_size for each in settings], dtype=np.float64)[:, None, None]
    groups = np.where(np.isfinite(drawn), drawn, prompts)
    per_update = {
        "tokens": tokens.values + np.where(first, unused, 0.0),
        "samples": np.where(np.isfinite(rollout), np.where(first, groups * size, 0.0), np.nan),
    }
    return {unit: _summed(tokens.updates, values) for unit, values in per_update.items()}


def _summed(updates: Any, values: Array) -> Cube:
    total = np.where(np.isfinite(values), np.cumsum(np.nan_to_num(values), axis=2), np.nan)
    start = np.where(np.isfinite(values).any(axis=2, keepdims=True), 0.0, np.nan)
    return Cube(np.concatenate([[0], updates]), np.concatenate([start, total], axis=2))


def positions(curve: Curve, effort: Cube | None, states: RunStates) -> Array:
    """Where the points of `curve` lie: at their updates, or at the mean effort of its runs up to there.

    Runs that diverged or were stopped say nothing of what came after, and count only where all did.
    """
    if effort is None:
        return curve.updates.astype(np.float64)
    lasting = curve.kept & ~states.cut
    runs = effort.values[lasting if lasting.any() else curve.kept]
    updates = np.union1d(effort.updates, curve.updates)
    values = np.full((len(runs), updates.size), np.nan)
    values[:, np.searchsorted(updates, effort.updates)] = runs
    at = filled(updates, values, np.ones(len(runs), dtype=np.bool_))[:, np.searchsorted(updates, curve.updates)]
    return np.asarray(at.mean(axis=0))


def label_effort(axes: Any, unit: str) -> None:
    """Whole numbers for updates, thousands and millions for the rest."""
    axes.set_xlabel(UNITS[unit])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    if unit != UPDATES:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
