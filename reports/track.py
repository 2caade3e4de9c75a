"""Curves, settings and results for trackers: a follower that reads a run's folder and sends what is new.

It never touches training: it can start late, stop, start again. What was sent is remembered in the run's report folder,
cell by cell, so that a requeued cell continues the same tracked run: its identity comes from the cell, and its group is
the configuration without its seed (`klab.reports.trackers`).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

from klab.grid import UserError
from klab.grid.grid_file import TRACKERS
from klab.harness.store import CellFolder, Run, files
from klab.harness.store.cell_folder import STATES
from klab.reports.trackers import Tracked, opened

_TEXTS = ("update", "samples", "schema")


class _End(NamedTuple):
    """How a cell ended: its state, updates made, final numbers, and what differs from an earlier end of it."""

    state: str
    update: int
    values: dict[str, float]
    mark: str


def follow(run: Run, tracker: str) -> int:
    """Sends every cell's new updates to `tracker`, and how it ended; how many updates were sent.

    The newest update of a cell that still trains waits for the next one, because its evaluation may not be written yet.

    Raises:
        UserError: for an unknown tracker, or when its package is not installed.
    """
    if tracker not in TRACKERS:
        raise UserError("unknown tracker", key="track", value=tracker, allowed=TRACKERS)
    folder = run.output_folder("report", tracker)
    memory = folder / "sent.json"
    try:
        record = files.read_record(memory) or {}
        sent, ended = {**record["sent"]}, {**record.get("ended", {})}
    except (OSError, UserError, KeyError, TypeError):
        sent, ended = {}, {}
    total = 0
    for identity in run.cells:
        if ended.get(identity) in STATES:  # nothing can come after a result
            continue
        cell = run.cell(identity)
        rows, end = _rows(cell, sent.get(identity, -1)), _end(cell)
        if end is not None and ended.get(identity) == end.mark:
            end = None
        if not rows and end is None:
            continue
        resolved = dict(cell.resolved())
        folder.mkdir(parents=True, exist_ok=True)
        tracked = Tracked(run.name, str(resolved["group"]), identity, tracked_id(run, identity), resolved, folder)
        with opened(tracker, tracked) as sink:
            for update, values in rows:
                sink.log(update, values)
            if end is not None:
                sink.end(end.state, end.update, end.values)
        if rows:
            sent[identity] = rows[-1][0]
        if end is not None:
            ended[identity] = end.mark
        total += len(rows)
        files.replace(memory, files.encode_record({"sent": sent, "ended": ended}))
    return total


def _rows(cell: CellFolder, after: int) -> list[tuple[int, dict[str, float]]]:
    """Metrics and evaluations by update, those after `after`."""
    if cell.last_metrics() is None or (cell.last_metrics() or {}).get("update", 0) <= after:
        return []
    merged: dict[int, dict[str, float]] = {}
    for prefix, rows in (("train", cell.metrics()), ("evaluation", cell.evaluations())):
        for row in rows:
            merged.setdefault(int(row["update"]), {}).update(_numbers(prefix, row))
    ended = cell.result() is not None or cell.error() is not None
    last = max(merged) if merged else -1
    return [(update, merged[update]) for update in sorted(merged) if update > after and (ended or update < last)]


def _end(cell: CellFolder) -> _End | None:
    result = cell.result()
    if result is not None:
        return _End(str(result["state"]), int(result["updates"]), _numbers("final", result), str(result["state"]))
    if cell.error() is None:
        return None
    attempts = sum(event["event"] == "started" for event in cell.attempts())
    return _End("failed", int((cell.last_metrics() or {}).get("update", 0)), {}, f"failed {attempts}")


def _numbers(prefix: str, row: dict[str, Any]) -> dict[str, float]:
    return {
        f"{prefix}/{name}": float(value)
        for name, value in row.items()
        if name not in _TEXTS and isinstance(value, int | float) and math.isfinite(value)
    }


def tracked_id(run: Run, identity: str) -> str:
    """The stable name of a cell at a tracker."""
    return hashlib.sha256(f"{run.name}/{identity}".encode()).hexdigest()[:16]
