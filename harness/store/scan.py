"""A snapshot of every cell's state, read quickly.

The cells' folders are the truth. The index beside them only saves reading results again: an entry counts as long as its
result's file is the very one that it was read from, for which one `stat` per cell is enough.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from klab.grid import UserError
from klab.harness.store import files
from klab.harness.store.cell_folder import STATES, CellFolder
from klab.harness.store.lock import is_stale, read_lock
from klab.harness.store.run import Run

_INDEX = "index.json"
_SUMMARY = (
    "state",
    "reason",
    "updates",
    "reward_final",
    "accuracy_final",
    "reverse_kl_final",
    "collapsed",
    "seconds",
    "tokens",
)


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

    @property
    def cancelled(self) -> bool:
        """Whether the newest event is a cancellation, which holds until a launch resumes the cell."""
        return (self.event or {}).get("event") == "cancelled"

    @property
    def held(self) -> bool:
        """Whether the newest event is a hold, which holds until the cell is released."""
        return (self.event or {}).get("event") == "held"


def scan(run: Run, cell_ids: Iterable[str] | None = None) -> dict[str, Snapshot]:
    """A snapshot of each cell (of all by default), in the manifest's order."""
    wanted = run.cells if cell_ids is None else list(cell_ids)
    index = read_index(run)
    folders = f"{run.path}/cells"
    present = names_in(folders)
    found: dict[str, Snapshot] = {}
    changed = 0
    for identity in wanted:
        if identity not in present:
            found[identity] = Snapshot(identity)
            continue
        stamp = stamp_of(f"{folders}/{identity}/result.json")
        known = index.get(identity)
        if known is not None and known[0] == stamp:
            found[identity] = Snapshot(identity, known[1])
            continue
        found[identity] = snapshot = look_at(run.cell(identity), probe=not run.read_only)
        if stamp is not None and snapshot.result is not None:
            index[identity] = [stamp, snapshot.result]
            changed += 1
    if changed > 50 and not run.read_only:  # few results are read again sooner than the index is written
        with suppress(OSError):
            files.replace(run.path / _INDEX, files.encode_record({"results": index}), durable=False)
    return found


def stamp_of(path: str) -> list[int] | None:
    """What differs after any write to a file, and for any other file in its place; None when there is none."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def look_at(folder: CellFolder, probe: bool = True) -> Snapshot:
    """What the files of one cell say; `probe` as in `is_stale`."""
    snapshot = Snapshot(folder.id)
    names = names_in(folder.path)
    try:
        result = folder.result() if "result.json" in names else None
        if result is not None:
            snapshot.result = {key: result[key] for key in _SUMMARY if key in result}
            return snapshot
        if "attempts.jsonl" in names:
            snapshot.event = folder.last_attempt()
        if "claim" in names:
            snapshot.claim = read_lock(folder.path / "claim")
            snapshot.alive = snapshot.claim is not None and not is_stale(folder.path / "claim", snapshot.claim, probe)
        if "heartbeat" in names:
            snapshot.heartbeat = folder.heartbeat()
    except UserError as error:
        snapshot.problem = str(error)
    snapshot.failed = "error.txt" in names
    return snapshot


def read_index(run: Run) -> dict[str, list[Any]]:
    """By cell, the stamp of a result's file and the main numbers of the result; {} where no index can be read."""
    try:
        record = files.read_record(run.path / _INDEX)
    except (UserError, OSError):
        return {}
    results = record.get("results") if record else None
    if not isinstance(results, dict):
        return {}
    return {key: entry for key, entry in results.items() if _valid(entry)}


def _valid(entry: object) -> bool:
    return (
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], dict) and entry[1].get("state") in STATES
    )


def names_in(folder: str | os.PathLike[str]) -> set[str]:
    """What lies in a folder; nothing where there is none."""
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
