"""Tables of the effects of axes and of pairs of axes, each from the family of its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from klab.reports.inference.design import Design
from klab.reports.inference.family import DIFFERS, EQUIVALENT, UNDECIDED, Family


class Effect(NamedTuple):
    """An axis, or a pair of axes: the values that are compared with the baseline's (numbers, one per axis), and what is
    said of each."""

    axes: tuple[int, ...]
    values: Sequence[tuple[int, ...]]
    family: Family


def levels_table(design: Design, effects: Sequence[Effect]) -> pd.DataFrame:
    """One row per axis and value."""
    tables = []
    for axes, values, family in effects:
        shown = _shown(design, axes[0], values, 0)
        table = pd.DataFrame({"axis": design.axes[axes[0]], "value": pd.Series(shown, dtype=object)})
        attach(table, family, "pairs")
        tables.append(table)
    empty = ["axis", "value", "difference", "low", "high", "p", "verdict", "pairs", "more_seeds"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=empty)


def effects_table(design: Design, effects: Sequence[Effect]) -> pd.DataFrame:
    """One row per axis, with the numbers of its clearest value."""
    rows = [
        {"axis": design.axes[axes[0]], **_clearest(family, {"value": _shown(design, axes[0], values, 0)})}
        for axes, values, family in effects
    ]
    columns = ["axis", "p", "verdict", "value", "difference", "low", "high", "more_seeds"]
    return pd.DataFrame(rows, columns=columns)


def interactions_table(design: Design, effects: Sequence[Effect]) -> pd.DataFrame:
    """One row per pair of axes, with the numbers of its clearest pair of values."""
    rows = []
    for (first, second), values, family in effects:
        names = {
            "value": _shown(design, first, values, 0),
            "other_value": _shown(design, second, values, 1),
        }
        rows.append({"axis": design.axes[first], "other": design.axes[second], **_clearest(family, names)})
    columns = ["axis", "other", "p", "verdict", "value", "other_value", "difference", "low", "high", "more_seeds"]
    return pd.DataFrame(rows, columns=columns)


def attach(table: pd.DataFrame, family: Family, count: str) -> None:
    """Adds what is said of each row; ``count`` names the column of the seeds behind it."""
    table["difference"], table["low"], table["high"] = family.estimate, family.low, family.high
    table["p"], table["verdict"] = family.p, family.verdict
    table[count], table["more_seeds"] = family.n, family.more


def _shown(design: Design, axis: int, values: Sequence[tuple[int, ...]], place: int) -> list[Any]:
    return [design.levels[axis][value[place]] for value in values]


def _clearest(family: Family, names: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The verdict over all values of an axis, and the numbers of the value with the smallest p."""
    known = np.isfinite(family.p)
    if not known.any():
        nothing = {"p": np.nan, "verdict": UNDECIDED, "difference": np.nan, "low": np.nan, "high": np.nan}
        return {**nothing, **dict.fromkeys(names), "more_seeds": np.nan}
    with np.errstate(divide="ignore", invalid="ignore"):
        clearness = np.abs(family.estimate) / (family.high - family.low)
    index = min(np.flatnonzero(known).tolist(), key=lambda i: (family.p[i], -np.nan_to_num(clearness[i])))
    same = known.all() and bool((family.verdict == EQUIVALENT).all())
    p = float(family.p[index])
    verdict = DIFFERS if (family.verdict == DIFFERS).any() else EQUIVALENT if same else UNDECIDED
    more = family.more[np.isfinite(family.more)]
    return {
        "p": p,
        "verdict": verdict,
        **{key: values[index] for key, values in names.items()},
        "difference": float(family.estimate[index]),
        "low": float(family.low[index]),
        "high": float(family.high[index]),
        "more_seeds": float(more.min()) if verdict == UNDECIDED and more.size else np.nan,
    }
