"""What the exact lab says of each cell's gradient, beside what the cell reached."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from klab.grid import UserError
from klab.harness.exact.drift_names import AS_TRAINED, ON_POLICY, is_own
from klab.harness.store import Run
from klab.reports.comparison import Comparison
from klab.reports.frame import records
from klab.reports.study import Study

COLUMNS = ("group", "drift", "bias", "cosine", "variance")
"""Columns that a gradient frame must have."""

NUMBERS = ("bias", "cosine", "variance", "ess", "mse")
"""Numbers of a gradient estimator that the table shows: relative bias, cosine to the true gradient, trace of the
variance per trajectory, effective sample size as a share, mean squared error at the training batch."""


@dataclass(frozen=True)
class GradientRow:
    """One configuration: its name and results, its estimator without drift, and after drift by its own updates."""

    group: str
    label: str
    reward: float
    reverse_kl: float
    drift: str
    fresh: dict[str, float]
    drifted: dict[str, float]


def load_gradients(study: Study) -> pd.DataFrame | None:
    """The rows that the exact lab left in the runs, the first run's first; None without any."""
    found = [frame for run in study.runs if (frame := _read(run)) is not None]
    return pd.concat(found, ignore_index=True) if found else None


def own_drift(gradients: pd.DataFrame) -> pd.DataFrame:
    """By group, the row after the drift of the configuration's own updates: as far as training went, where it is known;
    without drift where it has none."""
    own = _own(gradients).drop_duplicates("group", keep="last")
    rest = gradients[~gradients["group"].isin(own["group"])]
    fresh = rest[rest["drift"] == ON_POLICY].drop_duplicates("group")
    return pd.concat([own, fresh]).set_index("group")


def _own(gradients: pd.DataFrame) -> pd.DataFrame:
    """The rows of the cells' own drifts, that of training last."""
    rows = gradients[[is_own(str(drift)) for drift in gradients["drift"]]]
    return rows.sort_values("drift", key=lambda drift: drift == AS_TRAINED, kind="stable")


def gradient_rows(comparison: Comparison, gradients: pd.DataFrame | None) -> list[GradientRow]:
    """One row per configuration that was measured, in the order of the comparison."""
    if gradients is None or gradients.empty:
        return []
    rows = []
    for record in records(comparison.table):
        measured = gradients[gradients["group"] == record["group"]]
        if measured.empty:
            continue
        fresh = measured[measured["drift"] == ON_POLICY]
        own = _own(measured)
        rows.append(
            GradientRow(
                group=record["group"],
                label=record["label"],
                reward=record["mean"],
                reverse_kl=record["reverse_kl_final"],
                drift=str(own["drift"].iloc[-1]) if len(own) else "",
                fresh=_numbers(fresh.iloc[:1]),
                drifted=_numbers(own.iloc[-1:]),
            )
        )
    return rows


def gradient_table(comparisons: list[Comparison], gradients: pd.DataFrame | None) -> pd.DataFrame:
    """The same as a flat frame, for `gradients.csv`: one row per task, configuration and setting."""
    flat: list[dict[str, Any]] = []
    for comparison in comparisons:
        for row in gradient_rows(comparison, gradients):
            result = {"group": row.group, "cell": row.label, "final": row.reward, "reverse_kl_final": row.reverse_kl}
            for drift, numbers in ((ON_POLICY, row.fresh), (row.drift, row.drifted)):
                if numbers:
                    flat.append({"task": comparison.task, **result, "drift": drift, **numbers})
    return pd.DataFrame(flat)


def _numbers(row: pd.DataFrame) -> dict[str, float]:
    if row.empty:
        return {}
    values = {name: row[name].iloc[0] if name in row else None for name in NUMBERS}
    return {name: float(np.nan if value is None else value) for name, value in values.items()}


def _read(run: Run) -> pd.DataFrame | None:
    try:
        data = json.loads(run.gradients_text() or b"")
        frame = pd.DataFrame(data["rows"])
    except (OSError, ValueError, KeyError, UserError):
        return None
    return frame if set(COLUMNS) <= set(frame.columns) else None
