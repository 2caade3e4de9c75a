"""Numbers of many cells in one block of memory: a million small dictionaries would not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import pandas as pd

from klab.harness.store.metrics_reader import MetricColumns

_ROWS = 1 << 12


class Block:
    """A frame that grows by the rows of one cell after another: the cell (a category), the update (an integer), and
    columns of float64.

    Where it is full it doubles, and memory behind its rows is not touched: there is never much more than the frame.

    Args:
        names: columns that are there even where no row has them; others are added as rows bring them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._places: dict[str, int] = {}
        self._number(names)
        self._numbers = np.empty((len(self._places), _ROWS))
        self._updates: list[np.ndarray[Any, Any]] = []
        self._cells: list[str] = []
        self._rows = 0

    def add(self, cell: str, rows: Sequence[dict[str, Any]] | MetricColumns) -> None:
        """The rows of a cell. Of records the first and the last tell which columns there are; what is no number is
        NaN.
        """
        if not len(rows):
            return
        if isinstance(rows, MetricColumns):
            room = self._room(cell, rows.updates, rows.names)
            room[:] = np.nan
            room[[self._places[name] for name in rows.names]] = rows.values
            return
        names = [name for row in (rows[0], rows[-1]) for name, value in row.items() if isinstance(value, int | float)]
        room = self._room(cell, np.array([row["update"] for row in rows], dtype=np.int64), names)
        try:
            values = chain.from_iterable(map(itemgetter(*self._places), rows))
            table = np.fromiter(values, np.float64, room.size)
        except (KeyError, TypeError, ValueError):
            table = np.array([number(row.get(name)) for row in rows for name in self._places])
        room[:] = table.reshape(len(rows), -1).T

    def frame(self) -> pd.DataFrame:
        """The rows so far, without a copy: nothing can be added any more."""
        frame = pd.DataFrame(self._numbers[:, : self._rows].T, columns=list(self._places), copy=False)
        self._numbers.flags.writeable = False
        codes = np.repeat(np.arange(len(self._cells)), [len(updates) for updates in self._updates])
        frame.insert(0, "update", np.concatenate([np.empty(0, np.int64), *self._updates]))
        cells = pd.Categorical.from_codes(codes, categories=pd.Index(self._cells, dtype="str"))
        frame.insert(0, "cell", pd.Series(cells))
        return frame

    def _room(self, cell: str, updates: np.ndarray[Any, Any], names: Iterable[str]) -> np.ndarray[Any, Any]:
        """Where the numbers [columns, rows] of this cell go."""
        self._number(names)
        self._cells.append(cell)
        self._updates.append(updates)
        before, self._rows = self._rows, self._rows + len(updates)
        columns, capacity = self._numbers.shape
        if self._rows > capacity or len(self._places) > columns:
            while capacity < self._rows:
                capacity *= 2
            wider = np.empty((len(self._places), capacity))
            wider[:columns, :before] = self._numbers[:, :before]
            wider[columns:, :before] = np.nan
            self._numbers = wider
        return self._numbers[:, before : self._rows]

    def _number(self, names: Iterable[str]) -> None:
        for name in names:
            if name != "update":
                self._places.setdefault(name, len(self._places))


def last_update(rows: Sequence[dict[str, Any]] | MetricColumns) -> float:
    """The newest update of a cell, 0 where it has none."""
    if not len(rows):
        return 0.0
    return float(rows.updates[-1] if isinstance(rows, MetricColumns) else rows[-1]["update"])


def number(value: object) -> float:
    """The value as a float, NaN where it is no number."""
    return float(value) if isinstance(value, int | float) else float("nan")
