"""The design of a study: which cell and which seed every counted score belongs to, and every cell's axis values.

Three rules decide which runs count. A run that failed, is missing, has not ended or has no score is missing data. A
run that was stopped as hopeless counts with the score that it had then (last observation carried forward). A diverged
run counts as the lowest score that a finished or stopped run of its task reached, whatever score it wrote down.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from klab.grid import UserError

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Flags = NDArray[np.bool_]

TASK = "task"
"""An axis of this name is a stratum: scores of different tasks are not compared with each other."""

COUNTED = ("finished", "diverged", "stopped")
NOT_COUNTED = ("failed", "missing", "damaged", "running", "interrupted")
_COLUMNS = ("seed", "score", "state")


@dataclass(frozen=True)
class Design:
    """Counted runs (`N`), cells (`C`), axes (`A`) and tasks of a study.

    Attributes:
        axes: the axes but for the task.
        values: per cell, its value on every axis (and on the task) as written.
        codes: ``[C, A]``, the cell's value on each axis as an index into `levels`; 0 is the baseline's value.
        levels: per axis, its values as written, the baseline's first.
        task: ``[C]``, the index of each cell's task.
        tasks: the tasks as written; one, None, where the frame has no such column.
        baseline: per task, the index of its baseline cell, -1 where no row has it.
        compared: whether a baseline was named at all; without one the first values stand at its place in `levels`.
        cell, block: ``[N]``, each run's cell, and its block: runs of one task with the same seed.
        score: ``[N]``.
        block_task, block_seed: per block, the index of its task, and the number of its seed.
        diverged, stopped: ``[C]``, the number of diverged and of stopped runs that count.
        planned: ``[C]``, the number of rows.
    """

    axes: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[Mapping[str, Any], ...]
    codes: Indices
    levels: tuple[tuple[Any, ...], ...]
    task: Indices
    tasks: tuple[Any, ...]
    baseline: tuple[int, ...]
    compared: bool
    cell: Indices
    block: Indices
    block_task: Indices
    block_seed: Indices
    score: Array
    diverged: Indices
    stopped: Indices
    planned: Indices

    @property
    def cells(self) -> int:
        return len(self.values)

    @property
    def n(self) -> Indices:
        """``[C]``, the number of counted runs of each cell."""
        return np.bincount(self.cell, minlength=self.cells).astype(np.intp)


def read_design(frame: pd.DataFrame, baseline: Mapping[str, Any] | None, higher: bool = True) -> Design:
    """The design of a tidy frame: one row per run, columns ``seed``, ``score``, ``state``, and one per axis.

    Raises:
        UserError: for a column, state or baseline value that is not there, and for two rows of one cell and seed.
    """
    for column in _COLUMNS:
        if column not in frame.columns:
            raise UserError("the frame has no such column", key=column, allowed=map(str, frame.columns))
    columns = tuple(str(column) for column in frame.columns if column not in _COLUMNS)
    axes = tuple(column for column in columns if column != TASK)
    states = frame["state"].astype(str).to_numpy()
    for state in dict.fromkeys(states.tolist()):
        if state not in COUNTED + NOT_COUNTED:
            raise UserError("unknown state of a run", key="state", value=state, allowed=COUNTED + NOT_COUNTED)
    written = {column: frame[column].tolist() for column in columns}
    keys = {column: [_key(value) for value in written[column]] for column in columns}
    first = {column: _first(keys[column], written[column]) for column in columns}
    references = {axis: _reference(axis, first[axis], baseline) for axis in axes}
    for key, value in (baseline or {}).items():
        if key not in columns:
            raise UserError("the baseline names an axis that the frame does not have", key=key, allowed=columns)
        if key == TASK and _key(value) not in first[TASK]:
            raise UserError("no run has this value", key=TASK, value=value, allowed=map(str, first[TASK].values()))
    rows = list(zip(*(keys[column] for column in columns), strict=True)) if columns else [()] * len(frame)
    number: dict[tuple[Hashable, ...], int] = {}
    cell_of_row = np.asarray([number.setdefault(row, len(number)) for row in rows], dtype=np.intp)
    _, start = np.unique(cell_of_row, return_index=True)
    values = tuple({column: written[column][row] for column in columns} for row in start.tolist())
    tasks = first.get(TASK, {None: None})
    task_number = {key: i for i, key in enumerate(tasks)}
    task_keys = keys.get(TASK, [None] * len(frame))
    task = np.asarray([task_number[task_keys[row]] for row in start.tolist()], dtype=np.intp)
    codes, levels = _codes(
        [[keys[axis][row] for row in start.tolist()] for axis in axes], first, references, axes, task
    )
    seeds = [_key(seed) for seed in frame["seed"].tolist()]
    if len(set(zip(cell_of_row.tolist(), seeds, strict=True))) < len(frame):
        repeated = frame[pd.Series(list(zip(cell_of_row.tolist(), seeds, strict=True)), index=frame.index).duplicated()]
        raise UserError("two rows of one cell have the same seed", key="seed", value=repeated["seed"].iloc[0])
    score, counted = _scores(frame, states, task[cell_of_row] if len(frame) else cell_of_row, higher)
    blocks: dict[tuple[int, Hashable], int] = {}
    for row in range(len(frame)):
        blocks.setdefault((int(task[cell_of_row[row]]), seeds[row]), len(blocks))
    block = np.asarray([blocks[int(task[cell_of_row[row]]), seeds[row]] for row in range(len(frame))], dtype=np.intp)
    number_of_seed = {seed: i for i, seed in enumerate(dict.fromkeys(seeds))}
    own = {tuple(code): i for i, code in enumerate(np.column_stack([task[:, None], codes]).tolist())}
    return Design(
        axes=axes,
        columns=columns,
        values=values,
        codes=codes,
        levels=levels,
        task=task,
        tasks=tuple(tasks.values()),
        baseline=tuple(-1 if baseline is None else own.get((i, *([0] * len(axes))), -1) for i in range(len(tasks))),
        compared=baseline is not None,
        cell=cell_of_row[counted],
        block=block[counted],
        block_task=np.asarray([index for index, _ in blocks], dtype=np.intp),
        block_seed=np.asarray([number_of_seed[seed] for _, seed in blocks], dtype=np.intp),
        score=score[counted],
        diverged=np.bincount(cell_of_row[counted & (states == "diverged")], minlength=len(values)).astype(np.intp),
        stopped=np.bincount(cell_of_row[counted & (states == "stopped")], minlength=len(values)).astype(np.intp),
        planned=np.bincount(cell_of_row, minlength=len(values)).astype(np.intp),
    )


def cell_with(design: Design, values: Mapping[str, Any]) -> int:
    """The index of the cell that has these values on all columns.

    Raises:
        UserError: there is none.
    """
    wanted = {column: _key(values.get(column)) for column in design.columns}
    for cell, own in enumerate(design.values):
        if all(_key(own[column]) == key for column, key in wanted.items()):
            return cell
    raise UserError("no cell of the frame has these values", key="stated", value=dict(values))


def _key(value: Any) -> Hashable:
    # Two values are one value when they are written alike; 1 and 1.0 are, True and 1 are not.
    if value is None or (isinstance(value, float) and np.isnan(value)) or value is pd.NA:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, (int, float, str)):
        return value
    return ("json", json.dumps(value, sort_keys=True, default=str))


def _first(keys: Sequence[Hashable], written: Sequence[Any]) -> dict[Hashable, Any]:
    found: dict[Hashable, Any] = {}
    for key, value in zip(keys, written, strict=True):
        found.setdefault(key, value)
    return found


def _reference(axis: str, known: Mapping[Hashable, Any], baseline: Mapping[str, Any] | None) -> Hashable:
    if baseline is None:
        return next((key for key in known if key is not None), None)
    if axis not in baseline:
        if len(known) > 1:
            raise UserError("the baseline has no value on this axis", key=axis, allowed=map(str, known.values()))
        return next(iter(known), None)
    key = _key(baseline[axis])
    if known and key not in known:
        raise UserError(
            "no run has this value of the baseline", key=axis, value=baseline[axis], allowed=map(str, known)
        )
    return key


def _codes(
    keys: Sequence[Sequence[Hashable]],
    first: Mapping[str, Mapping[Hashable, Any]],
    references: Mapping[str, Hashable],
    axes: Sequence[str],
    task: Indices,
) -> tuple[Indices, tuple[tuple[Any, ...], ...]]:
    codes = np.zeros((task.size, len(axes)), dtype=np.intp)
    levels = []
    for a, axis in enumerate(axes):
        order = [references[axis], *(key for key in first[axis] if key != references[axis])]
        number = {key: i for i, key in enumerate(order)}
        codes[:, a] = [number[key] for key in keys[a]]
        levels.append(tuple(first[axis].get(key, key) for key in order))
    # A cell in which an axis does nothing has no value there and counts as having the baseline's, unless that would
    # make it the same cell as another.
    for a, axis in enumerate(axes):
        idle = np.asarray([key is None for key in keys[a]], dtype=bool)
        if references[axis] is None or not idle.any():
            continue
        moved = codes.copy()
        moved[idle, a] = 0
        if len(np.unique(np.column_stack([task, moved]), axis=0)) == len(codes):
            codes = moved
    return codes, tuple(levels)


def counted_scores(score: Array, states: NDArray[Any], higher: bool = True) -> tuple[Array, float]:
    """The scores of one task's runs as they count, and the worst of a finished or stopped run (NaN without any).

    Finished and stopped runs count with their score, diverged ones with that worst score, others not at all (NaN).
    """
    scored = np.isfinite(score) & np.isin(states, ("finished", "stopped"))
    worst = float((np.min if higher else np.max)(score[scored])) if scored.any() else np.nan
    return np.where(scored, score, np.where(states == "diverged", worst, np.nan)), worst


def _scores(frame: pd.DataFrame, states: NDArray[Any], task: Indices, higher: bool) -> tuple[Array, Flags]:
    score = pd.to_numeric(frame["score"], errors="coerce").to_numpy(dtype=np.float64, copy=True)
    for index in np.unique(task):
        here = task == index
        score[here] = counted_scores(score[here], states[here], higher)[0]
    return score, np.isfinite(score)
