"""Where every cell of a run stands, read quickly: one folder listing per cell, results from an index beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from grid import Mistake
from harness.store import files
from harness.store.cell_folder import CellFolder
from harness.store.lock import read_lock, stale
from harness.store.run import Run

_INDEX = "index.json"
_SUMMARY = ("state", "updates", "reward_final", "accuracy_final", "reverse_kl_final", "collapsed", "seconds", "tokens")


@dataclass(slots=True)
class Snapshot:
    """What a cell's own folder says.

    `result` holds the main numbers of result.json; `claim` what the holder of the claim wrote and `alive` whether it
    lives; `event` the newest attempt record; `heartbeat` the newest progress; `problem` names a damaged file.
    """

    id: str
    result: dict[str, Any] | None = None
    failed: bool = False
    claim: dict[str, Any] | None = None
    alive: bool = False
    event: dict[str, Any] | None = None
    heartbeat: dict[str, Any] | None = None
    problem: str | None = None


def scan(run: Run, cell_ids: Iterable[str] | None = None) -> dict[str, Snapshot]:
    """A snapshot of each cell (of all by default), in the manifest's order."""
    wanted = run.cells if cell_ids is None else list(cell_ids)
    index = _read_index(run)
    present = _names(run.path / "cells")
    found: dict[str, Snapshot] = {}
    changed = 0
    for identity in wanted:
        if identity not in present:
            found[identity] = Snapshot(identity)
            continue
        snapshot, entry = _look(run.cell(identity), index.get(identity))
        found[identity] = snapshot
        if entry is not None and entry is not index.get(identity):
            index[identity] = entry
            changed += 1
    if changed > 50:  # few results are read again sooner than the index is written
        with suppress(OSError):
            files.replace(run.path / _INDEX, files.seal({"results": index}), durable=False)
    return found


def _look(folder: CellFolder, entry: list[Any] | None) -> tuple[Snapshot, list[Any] | None]:
    snapshot = Snapshot(folder.id)
    names = _names(folder.path)
    try:
        if "result.json" in names:
            entry = _summary(folder, entry)
            snapshot.result = entry[2]
            return snapshot, entry
        if "attempts.jsonl" in names:
            snapshot.event = folder.last_attempt()
        if "claim" in names:
            snapshot.claim = read_lock(folder.path / "claim")
            snapshot.alive = snapshot.claim is not None and not stale(folder.path / "claim", snapshot.claim)
        if "heartbeat" in names:
            snapshot.heartbeat = folder.heartbeat()
    except Mistake as mistake:
        snapshot.problem = str(mistake)
    snapshot.failed = "error.txt" in names
    return snapshot, None


def _summary(folder: CellFolder, entry: list[Any] | None) -> list[Any]:
    status = os.stat(folder.path / "result.json")
    stamp = [status.st_mtime_ns, status.st_size]
    if entry is not None and entry[:2] == stamp:
        return entry
    result = folder.result() or {}
    return [*stamp, {key: result[key] for key in _SUMMARY if key in result}]


def _read_index(run: Run) -> dict[str, list[Any]]:
    try:
        record = files.read_record(run.path / _INDEX)
    except (Mistake, OSError):
        return {}
    results = record.get("results") if record else None
    if not isinstance(results, dict):
        return {}
    return {key: entry for key, entry in results.items() if _valid(entry)}


def _valid(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and isinstance(entry[2], dict)
        and entry[2].get("state") in ("finished", "diverged")
    )


def _names(folder: os.PathLike[str]) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
