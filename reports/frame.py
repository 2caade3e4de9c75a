"""A run as tidy frames: one row per cell, per (cell, update) and per (cell, evaluation), read once and kept in a
columnar cache.

The cache lies in the run's report folder and holds, per cell, a fingerprint of the files in the cell's folder; only
cells whose fingerprint changed are read again. Deleting the cache loses nothing.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from klab.grid import UserError
from klab.grid.score import LM_EVAL, PARTS, RESULTS
from klab.harness.store import CellFolder, Run, files
from klab.harness.store.metrics_reader import MetricColumns, read_metric_columns
from klab.reports.numeric_frame import Block, last_update, number
from klab.reports.schema import EVALUATIONS, METRICS
from klab.reports.software import encoded

MOMENTS = 5
"""Evaluations of a cell whose completions are kept."""

_VERSION = 8
T = TypeVar("T")
_QUIET = ("heartbeat", "claim")
_SAMPLES = ("cell", "update", "prompt", "completion", "reward")
_ENDED = ("finished", "diverged", "stopped", "failed", "damaged")
_ERROR_TAIL = 4000
_TOGETHER = 64
"""Cells whose metrics are parsed at once."""


@dataclass(frozen=True)
class Frames:
    """The tidy frames of one run; `metrics`, `evaluations` and `samples` name their cell in the column ``cell``.

    `samples` holds the completions stored at `MOMENTS` of each cell's evaluations, from the first to the last. The
    column ``software`` of `cells` has what `software.encoded` says of a result.
    """

    cells: pd.DataFrame
    metrics: pd.DataFrame
    evaluations: pd.DataFrame
    samples: pd.DataFrame


def read_frames(run: Run, cache: bool = True) -> Frames:
    """The frames of a run, from the cache where that is current."""
    marks = {identity: fingerprint(run.cell(identity)) for identity in run.cells}
    folder = run.output_folder("report", "cache")
    old = _load(folder) if cache else None
    known = dict(zip(old.cells["cell"], old.cells["mark"], strict=True)) if old is not None else {}
    changed = [identity for identity, mark in marks.items() if known.get(identity) != mark]
    frames = old
    if old is None or changed or len(known) != len(marks):
        fresh = _read(run, changed, marks)
        frames = fresh if old is None else _merge(old, fresh, set(marks) - set(changed))
        if cache:
            _save(folder, frames)
    assert frames is not None
    order = pd.DataFrame({"cell": list(marks)})
    cells = order.merge(frames.cells, on="cell", how="left")
    cells["state"] = [
        state if state in _ENDED else _alive(run.cell(identity), updates)
        for identity, state, updates in zip(cells["cell"], cells["state"], cells["updates"], strict=True)
    ]
    return Frames(cells.drop(columns="mark"), frames.metrics, frames.evaluations, frames.samples)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain dictionaries; much faster than pandas' own for many small frames, so take a whole frame at
    once.
    """
    names = [str(name) for name in frame.columns]
    return [
        dict(zip(names, row, strict=True))
        for row in zip(*(frame[name].tolist() for name in frame.columns), strict=True)
    ]


def fingerprint(folder: CellFolder) -> str:
    """Names, sizes and times of the files directly in the cell's folder; equal as long as nothing was written there."""
    try:
        with os.scandir(folder.path) as entries:
            found = [(entry.name, entry.stat()) for entry in entries if entry.name not in _QUIET and entry.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return ";".join(
        f"{name}:{status.st_size}:{status.st_mtime_ns}" for name, status in sorted(found, key=lambda item: item[0])
    )


def _alive(folder: CellFolder, updates: float) -> str:
    try:
        if folder.claim_holder() is not None:
            return "running"
    except UserError:
        return "damaged"
    return "interrupted" if updates > 0 else "missing"


def _read(run: Run, identities: list[str], marks: Mapping[str, str]) -> Frames:
    cells: list[dict[str, Any]] = []
    metrics, evaluations = Block(METRICS), Block(EVALUATIONS)
    samples: list[tuple[Any, ...]] = []
    numbers: dict[str, MetricColumns] = {}
    for place, identity in enumerate(identities):
        if place % _TOGETHER == 0:
            some = [each for each in identities[place : place + _TOGETHER] if marks[each]]
            numbers = read_metric_columns({each: run.cell(each).path / "metrics.jsonl" for each in some})
        folder = run.cell(identity)
        row: dict[str, Any] = {
            "cell": identity,
            "mark": marks[identity],
            "state": "missing",
            "error": None,
            "software": "",
        }
        row.update(dict.fromkeys(RESULTS, np.nan))
        cells.append(row)
        if not marks[identity]:
            continue
        try:
            result, measured, evaluated = folder.read_measurements(numbers.get(identity))
            error = folder.error() if result is None else None
        except UserError as error:
            row.update(state="damaged", error=str(error))
            continue
        row["updates"] = last_update(measured)
        if result is not None:
            row.update(
                {name: number(result.get(name)) for name in RESULTS}, state=result["state"], software=encoded(result)
            )
            row.update(_metrics(result))
        elif error is not None:
            row.update(state="failed", error=error[-_ERROR_TAIL:])
        metrics.add(identity, measured)
        evaluations.add(identity, [evaluation_numbers(row) for row in evaluated])
        for evaluation in spread(evaluated, MOMENTS):
            samples += [_sample(identity, evaluation["update"], item) for item in evaluation.get("samples") or ()]
    columns = ["cell", "mark", "state", "error", "software", *RESULTS]
    columns += sorted({name for row in cells for name in row if name.startswith(LM_EVAL)})
    table = pd.DataFrame(cells, columns=columns).astype({"error": "str"} if cells else {})
    return Frames(table, metrics.frame(), evaluations.frame(), pd.DataFrame(samples, columns=list(_SAMPLES)))


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of lm-evaluation-harness in a result, each as a number of its own, ``lm_eval.TASK.METRIC``."""
    found = result.get("lm_eval")
    return {f"{LM_EVAL}{name}": number(value) for name, value in found.items()} if isinstance(found, dict) else {}


def evaluation_numbers(row: dict[str, Any]) -> dict[str, Any]:
    """An evaluation with every part of the reward as a number of its own, ``parts.NAME``."""
    parts = row.get("parts")
    return row | {f"{PARTS}{name}": value for name, value in parts.items()} if isinstance(parts, dict) else row


def spread(rows: Sequence[T], most: int) -> list[T]:
    """At most `most` of the rows, evenly from the first to the last."""
    count = min(len(rows), most)
    return [rows[round(i * (len(rows) - 1) / max(count - 1, 1))] for i in range(count)]


def _sample(identity: str, update: int, item: object) -> tuple[Any, ...]:
    part = item if isinstance(item, dict) else {}
    prompt, completion = str(part.get("prompt", "")), str(part.get("completion", ""))
    return identity, update, prompt[:2000], completion[:2000], number(part.get("reward"))


def _merge(old: Frames, fresh: Frames, kept: set[str]) -> Frames:
    def both(name: str) -> pd.DataFrame:
        before: pd.DataFrame = getattr(old, name)
        after: pd.DataFrame = getattr(fresh, name)
        before = before[before["cell"].isin(kept)]
        if before.empty or after.empty:
            return after if before.empty else before
        if isinstance(after["cell"].dtype, pd.CategoricalDtype):
            names = [*before["cell"].cat.categories, *after["cell"].cat.categories]
            kind = pd.CategoricalDtype(list(dict.fromkeys(names)))
            before, after = before.astype({"cell": kind}), after.astype({"cell": kind})
        return pd.concat([before, after], ignore_index=True)

    return Frames(both("cells"), both("metrics"), both("evaluations"), both("samples"))


_HEAD_BYTES = 4096
_NAMES = ("cells", "metrics", "evaluations", "samples")


def _load(folder: Path) -> Frames | None:
    """The cached frames; None when there are none, or they are damaged or of another version (it is only a cache)."""
    try:
        with files.open_file(folder / "head.json") as stream:
            head = json.loads(stream.read(_HEAD_BYTES) or b"")
        if head["version"] != _VERSION:
            return None
        return Frames(*(_load_frame(folder / f"{name}-{head['token']}.parquet") for name in _NAMES))
    except Exception:
        return None


def _load_frame(file: Path) -> pd.DataFrame:
    with files.open_file(file) as stream:
        return pd.read_parquet(stream)


def _save(folder: Path, frames: Frames) -> None:
    """Replaces the cache; a run folder that cannot be written goes without."""
    token = secrets.token_hex(6)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for name in _NAMES:
            getattr(frames, name).to_parquet(folder / f"{name}-{token}.parquet", compression="lz4")
        temporary = folder / f"head-{token}.tmp"
        temporary.write_text(json.dumps({"schema": 1, "version": _VERSION, "token": token}))
        os.replace(temporary, folder / "head.json")
        for stale in folder.glob("*.parquet"):
            if token not in stale.name:
                stale.unlink(missing_ok=True)
