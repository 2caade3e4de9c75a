"""One cell's folder: what it is, how far it got, what it measured, how it ended."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.grid import UserError
from klab.harness.store import files
from klab.harness.store.lock import Lock, is_stale, read_lock
from klab.harness.store.process import ProcessId

if TYPE_CHECKING:
    from klab.grid import Cell
    from klab.harness.store.metrics_reader import MetricColumns

STATES = ("finished", "diverged", "stopped")
"""How a cell can end with a result: after all updates, as diverged, or by its rule `training.stop`."""

_ROWS = "rows"
"""Key of result.json with the number of lines of the other files; not part of the result."""
_CLAIMS: dict[Path, Lock] = {}
"""The claims of this process: cell folder -> lock."""


class ClaimRevoked(RuntimeError):
    """The cell was cancelled, or taken over by another process: this one must not write to it any more."""


class CellFolder:
    """`cells/<id>/` of a run. Nothing is created before something is written.

    Rows of metrics and evaluations have an integer `update`, strictly increasing; a damaged row is a `UserError`, a
    torn last one is dropped. One process at a time writes: the one that holds the `claim`.
    """

    def __init__(self, path: Path, identity: str, resolved: Callable[[], Mapping[str, Any]]) -> None:
        self.path = path
        self.id = identity
        self._resolved = resolved

    # -- what it is -------------------------------------------------------------------------------------------------

    def resolved(self) -> Mapping[str, Any]:
        """All settings as plain data, without validation."""
        return self._resolved()

    def cell(self) -> Cell:
        """The cell of this folder."""
        from klab.grid import Cell

        return Cell.from_resolved(self._resolved())

    @property
    def checkpoint(self) -> Path:
        """Folder of the training state to resume from."""
        return self.path / "checkpoint"

    @property
    def policy(self) -> Path:
        """Folder of the trained policy, an ordinary Hugging Face checkpoint."""
        return self.path / "policy"

    # -- who writes -------------------------------------------------------------------------------------------------

    def claim(self, *, purpose: str = "training", details: dict[str, Any] | None = None) -> None:
        """Become the cell's only writer until `release_claim`.

        Raises:
            LockHeld: when a living process has it.
        """
        self._make()
        lock = Lock(self.path / "claim", purpose=purpose, details=details)
        lock.acquire()
        _CLAIMS[self.path] = lock
        files.remove_temporaries(self.path)

    def release_claim(self) -> None:
        lock = _CLAIMS.pop(self.path, None)
        if lock is not None:
            lock.release()

    def refresh_claim(self) -> None:
        """Renew the time stamp of this process's claim, which shows other machines that it lives."""
        lock = _CLAIMS.get(self.path)
        if lock is not None:
            lock.refresh()

    def revoke(self) -> None:
        """Take the claim away from its holder, whose next write raises `ClaimRevoked`."""
        (self.path / "claim").unlink(missing_ok=True)

    def claim_holder(self) -> dict[str, Any] | None:
        """The record of the living holder of the claim, None when there is none."""
        record = read_lock(self.path / "claim")
        return record if record is not None and not is_stale(self.path / "claim", record) else None

    def assert_owner(self) -> None:
        """Raises `ClaimRevoked` when this process's claim was revoked; a process that never claimed the cell passes."""
        lock = _CLAIMS.get(self.path)
        if lock is not None and not lock.is_ours():
            raise ClaimRevoked(f"cell {self.id} was cancelled or taken over by another process")

    # -- what it measured -------------------------------------------------------------------------------------------

    def metrics(self) -> list[dict[str, Any]]:
        """One row per optimizer update, in order."""
        return _checked(files.read_lines(self.path / "metrics.jsonl"), self.path / "metrics.jsonl")

    def last_metrics(self) -> dict[str, Any] | None:
        """The newest row of metrics, without reading the others."""
        return files.last_line(self.path / "metrics.jsonl")

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._append("metrics.jsonl", rows)

    def truncate_metrics(self, through_update: int) -> int:
        """Drop rows after `through_update` (and a torn last line); how many are left."""
        return self._keep("metrics.jsonl", through_update)

    def evaluations(self) -> list[dict[str, Any]]:
        """One row per evaluation, in order; the one before the first update has `update` 0."""
        return _checked(files.read_lines(self.path / "evaluations.jsonl"), self.path / "evaluations.jsonl")

    def append_evaluations(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._append("evaluations.jsonl", rows)

    def truncate_evaluations(self, through_update: int) -> int:
        """Drop rows after `through_update` (and a torn last line); how many are left."""
        return self._keep("evaluations.jsonl", through_update)

    def sync(self) -> None:
        """Make the rows written so far survive a power cut; call it before a checkpoint refers to them."""
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            path = self.path / name
            if path.exists():
                with path.open("rb+") as file:
                    file.flush()
                    os.fsync(file.fileno())

    # -- its life ---------------------------------------------------------------------------------------------------

    def attempts(self) -> list[dict[str, Any]]:
        """Events of this cell's life in order: started, ended, cancelled, relaunched, held, released; each with `event`
        and `at`."""
        path = self.path / "attempts.jsonl"
        rows = files.read_lines(path)
        for number, row in enumerate(rows, 1):
            _check_event(row, f"{path} line {number}")
        return rows

    def last_attempt(self) -> dict[str, Any] | None:
        """The newest event, without reading the others."""
        path = self.path / "attempts.jsonl"
        row = files.last_line(path)
        return _check_event(row, path) if row is not None else None

    def withheld(self) -> dict[str, Any] | None:
        """The event by which the cell may not start: `cancelled` and not launched again since, or `held` and not
        released. None: it may. The end of an attempt ends a hold that came while it ran.
        """
        found = None
        for event in self.attempts():
            if event["event"] in ("cancelled", "held"):
                found = event
            elif event["event"] in ("relaunched", "released") or (
                event["event"] == "ended" and found is not None and found["event"] == "held"
            ):
                found = None
        return found

    def append_attempt(self, event: Mapping[str, Any]) -> None:
        self._make()
        files.append_lines(self.path / "attempts.jsonl", [event], durable=True)

    def heartbeat(self) -> dict[str, Any] | None:
        """The newest heartbeat: the process and its progress. A damaged one counts as none."""
        try:
            return files.read_record(self.path / "heartbeat")
        except UserError:
            return None

    def write_heartbeat(self, progress: Mapping[str, Any]) -> None:
        """Replace the heartbeat: progress, process and time."""
        self.assert_owner()
        self._make()
        record = {**progress, **ProcessId.current().to_record()}
        files.replace(self.path / "heartbeat", files.encode_record(record) + b"\n", durable=False)

    def result(self) -> dict[str, Any] | None:
        """How the cell ended, None before that."""
        record = self._read_result()
        if record is not None:
            record.pop(_ROWS, None)
        return record

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write the result, after everything else: from then on the cell is never run again."""
        if result.get("state") not in STATES:
            raise ValueError(f"a result's state is one of {', '.join(STATES)}, not {result.get('state')!r}")
        self.assert_owner()
        self._make()
        self.sync()
        rows = {name: _lines(self.path / f"{name}.jsonl") for name in ("metrics", "evaluations")}
        files.replace(self.path / "result.json", files.encode_record({**result, _ROWS: rows}, indent=2))
        (self.path / "error.txt").unlink(missing_ok=True)

    def read_measurements(
        self, numbers: MetricColumns | None = None
    ) -> tuple[dict[str, Any] | None, list[dict[str, Any]] | MetricColumns, list[dict[str, Any]]]:
        """The result, the metrics and the evaluations, each file read once.

        Args:
            numbers: the metrics, where `read_metric_columns` could read them.

        Raises:
            UserError: where one of them is damaged, or rows are gone that were there when the result was written.
        """
        record = self._read_result()
        counts: dict[str, int] = dict((record or {}).pop(_ROWS, None) or {})
        fits = numbers is not None and len(numbers) == counts.get("metrics", len(numbers))
        metrics = numbers if numbers is not None and fits else self.metrics()  # it may have ended in between
        evaluations = self.evaluations()
        if record is not None:
            for name, found in (("metrics", len(metrics)), ("evaluations", len(evaluations))):
                if found != counts.get(name, found):
                    problem = f"has {found} rows of the {counts[name]} that belong to the result"
                    raise files.damaged_file(self.path / f"{name}.jsonl", problem)
        return record, metrics, evaluations

    def error(self) -> str | None:
        """Why the cell failed, None when it did not."""
        try:
            with files.open_file(self.path / "error.txt") as file:
                text = (file.read(files.LINE_BYTES) or b"").decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        first, _, rest = text.partition("\n")
        return rest if first.startswith("schema:") else text

    def record_failure(self, text: str) -> None:
        """Record why the cell failed; does nothing when this process's claim was revoked."""
        try:
            self.assert_owner()
        except ClaimRevoked:
            return
        self._make()
        files.replace(self.path / "error.txt", f"schema: {files.SCHEMA}\n{text}".encode(errors="replace"))

    def clear_failure(self) -> None:
        """Forget the failure, so that the cell may run again."""
        (self.path / "error.txt").unlink(missing_ok=True)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _read_result(self) -> dict[str, Any] | None:
        path = self.path / "result.json"
        record = files.read_record(path)
        if record is not None and record.get("state") not in STATES:
            raise files.damaged_file(path, f"has the state {record.get('state')!r} instead of {' or '.join(STATES)}")
        return record

    def _make(self) -> None:
        if (self.path / "cell.yaml").exists():
            return
        from klab.grid.yaml_document import dump_yaml

        self.path.mkdir(parents=True, exist_ok=True)
        text = dump_yaml({"schema": files.SCHEMA, **self._resolved()})
        try:
            files.replace(self.path / "cell.yaml", text.encode())
        except FileNotFoundError:  # a process that claimed the cell meanwhile wrote the file and removed temporaries
            if not (self.path / "cell.yaml").exists():
                raise
        files.sync_folder(self.path.parent)

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        self.assert_owner()
        self._make()
        files.append_lines(self.path / name, rows)

    def _keep(self, name: str, through_update: int) -> int:
        self.assert_owner()
        path = self.path / name
        rows = _checked(files.read_lines(path), path)
        kept = [row for row in rows if row["update"] <= through_update]
        data = b"".join(files.encode_record(row) + b"\n" for row in kept)
        if path.exists() and path.stat().st_size != len(data):
            files.replace(path, data)
        return len(kept)


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _checked(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    before = -1
    for number, row in enumerate(rows, 1):
        update = row.get("update")
        if type(update) is not int or update <= before:
            raise files.damaged_file(f"{path} line {number}", f"has update {update!r} after update {before}")
        before = update
    return rows


def _check_event(row: dict[str, Any], where: Path | str) -> dict[str, Any]:
    at = row.get("at")
    if not isinstance(row.get("event"), str) or not isinstance(at, int | float) or not math.isfinite(at):
        raise files.damaged_file(where, "is not an event with its time")
    return row
