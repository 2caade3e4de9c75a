"""Curves for TensorBoard and Weights & Biases: a follower that reads a run's folder and sends what is new.

It never touches training: it can start late, stop, start again. What was sent is remembered in the run's report folder,
cell by cell, so that a requeued cell continues the same tracked run: its identity comes from the cell, and `group` is
the configuration without its seed. Both packages are optional and imported only here.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from klab.grid import UserError
from klab.harness.store import CellFolder, Run, files

TRACKERS = ("tensorboard", "wandb")
_TEXTS = ("update", "samples", "schema")


class Sink(Protocol):
    """Where a cell's numbers go."""

    def log(self, update: int, values: dict[str, float]) -> None:
        """The numbers of one update; updates come in order."""


def follow(run: Run, tracker: str) -> int:
    """Sends every cell's new updates to `tracker`; how many were sent.

    The newest update of a cell that still trains waits for the next one, because its evaluation may not be written yet.

    Raises:
        UserError: for an unknown tracker, or when its package is not installed.
    """
    if tracker not in TRACKERS:
        raise UserError("unknown tracker", key="track", value=tracker, allowed=TRACKERS)
    folder = run.output_folder("report", tracker)
    memory = folder / "sent.json"
    try:
        sent: dict[str, int] = (files.read_record(memory) or {})["sent"]
    except (OSError, UserError, KeyError):
        sent = {}
    total = 0
    for identity in run.cells:
        cell = run.cell(identity)
        rows = _rows(cell, sent.get(identity, -1))
        if not rows:
            continue
        with _open(tracker, run, cell, folder) as sink:
            for update, values in rows:
                sink.log(update, values)
        sent[identity] = rows[-1][0]
        total += len(rows)
        files.replace(memory, files.encode_record({"sent": sent}))
    return total


def _rows(cell: CellFolder, after: int) -> list[tuple[int, dict[str, float]]]:
    """Metrics and evaluations by update, those after `after`."""
    if cell.last_metrics() is None or (cell.last_metrics() or {}).get("update", 0) <= after:
        return []
    merged: dict[int, dict[str, float]] = {}
    for prefix, rows in (("train", cell.metrics()), ("evaluation", cell.evaluations())):
        for row in rows:
            values = {
                f"{prefix}/{name}": float(value)
                for name, value in row.items()
                if name not in _TEXTS and isinstance(value, int | float) and math.isfinite(value)
            }
            merged.setdefault(int(row["update"]), {}).update(values)
    ended = cell.result() is not None or cell.error() is not None
    last = max(merged) if merged else -1
    return [(update, merged[update]) for update in sorted(merged) if update > after and (ended or update < last)]


def tracked_id(run: Run, identity: str) -> str:
    """The stable name of a cell at a tracker."""
    return hashlib.sha256(f"{run.name}/{identity}".encode()).hexdigest()[:16]


def _open(tracker: str, run: Run, cell: CellFolder, folder: Path) -> AbstractContextManager[Sink]:
    folder.mkdir(parents=True, exist_ok=True)
    return _tensorboard(cell, folder) if tracker == "tensorboard" else _wandb(run, cell, folder)


class _Events:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, update: int, values: dict[str, float]) -> None:
        summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
        event = import_module("tensorboard.compat.proto.event_pb2").Event
        scalars = [summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.add_event(event(step=update, summary=summary(value=scalars)))


@contextmanager
def _tensorboard(cell: CellFolder, folder: Path) -> Iterator[Sink]:
    try:
        module = import_module("tensorboard.summary.writer.event_file_writer")
    except ImportError as error:
        raise UserError("TensorBoard is not installed", key="track", hint="pip install 'klab[track]'") from error
    resolved = cell.resolved()
    writer = module.EventFileWriter(str(folder / str(resolved["group"]) / f"seed-{resolved['seed']}"))
    try:
        yield _Events(writer)
    finally:
        writer.close()


class _Wandb:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, update: int, values: dict[str, float]) -> None:
        self.run.log(values, step=update)


@contextmanager
def _wandb(run: Run, cell: CellFolder, folder: Path) -> Iterator[Sink]:
    """One tracked run per cell; without a key or `WANDB_MODE` it is written offline, to be sent with `wandb sync`."""
    try:
        wandb = import_module("wandb")
    except ImportError as error:
        raise UserError("Weights & Biases is not installed", key="track", hint="pip install 'klab[track]'") from error
    resolved = dict(cell.resolved())
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    tracked = wandb.init(
        project=run.name,
        id=tracked_id(run, cell.id),
        group=str(resolved["group"]),
        name=cell.id,
        config=resolved,
        dir=str(folder),
        mode=mode,
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(silent=True, console="off"),
    )
    try:
        yield _Wandb(tracked)
    finally:
        tracked.finish()
