"""One run as it is now: every cell's line, kept up to date by reading what changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from klab.harness.dispatch.backends import JobStatus
from klab.harness.dispatch.pace import Pace
from klab.harness.dispatch.status import FINAL_STATES, STATES, CellStatus, controller_problem, executors_of, statuses
from klab.harness.serve.cells import Identity, Row, axes_of, identity_of, row_of, states_of
from klab.harness.serve.curves import CurveShelf
from klab.harness.serve.series import finite
from klab.harness.serve.text import clipped
from klab.harness.store import Run
from klab.harness.store.watcher import Watcher

SECONDS = 1.0
"""Between two looks at a run, at least; a look that took long is followed by a pause fifteen times as long."""
SCHEDULER_SECONDS = 20.0
"""Between two questions to a batch system."""


class LiveRun:
    """A run folder that is looked at again and again; nothing in it is written. Hold `lock` while using it.

    Attributes:
        rows: by cell, in the grid's order; cells that wait for tuned settings at the end.
        version: another number after any change of a row.
        curves: what the cells that were looked at have measured.

    Args:
        path: the run folder.
        every: seconds between two looks, at least.

    Raises:
        UserError: it is no run folder, or damaged.
    """

    def __init__(self, path: Path, every: float = SECONDS) -> None:
        self.lock = threading.RLock()
        self.rows: dict[str, Row] = {}
        self.version = 0
        self._every = every
        self._path = path
        self._due = 0.0
        self._open()

    def _open(self) -> None:
        stamp = self._stamp()
        self.run = Run.open(self._path, read_only=True)
        self.curves = CurveShelf(self.run.path)
        self._manifest = stamp
        self._watcher = Watcher(self.run)
        self._changed: dict[str, None] = dict.fromkeys(self.run.cells)
        cells = [identity_of(self.run, identity, place) for place, identity in enumerate(self.run.cells)]
        self._by_id = {cell.id: cell for cell in cells}
        self._axes = axes_of(self.run.manifest, cells)
        self._jobs: dict[str, tuple[str, JobStatus]] = {}
        self._asked: dict[str, tuple[float, dict[str, JobStatus]]] = {}
        self._pace = Pace()
        self._left: float | None = None
        self._problem: str | None = None
        self.rows = {}
        self.version += 1

    def refresh(self) -> None:
        """Look at the run, unless that was done just now.

        Raises:
            UserError: it is damaged.
        """
        began = time.monotonic()
        if began < self._due:
            return
        if self._stamp() != self._manifest:
            self._open()
        self._changed.update(dict.fromkeys(self._watcher.look()))
        before, answers = self._jobs, self._ask()
        moved = [name for name in {**before, **self._jobs} if before.get(name) != self._jobs.get(name)]
        cells = self.run.manifest["cells"]
        self._changed.update(dict.fromkeys(name for name in moved if name in cells))
        changed = list(self._changed)
        if changed:
            snapshots = {identity: self._watcher.snapshots[identity] for identity in changed}
            self._update(statuses(self.run, answers, changed, snapshots))
        if self.run.tuned is not None and (changed or moved):
            self._replace_pending(statuses(self.run, answers, None, {}))
        self._changed = {}  # only now: what could not be told, because a file was damaged, is told by the next look
        rows = [row.status for row in self.rows.values()]
        self._left = self._pace.left(rows)
        self._problem = controller_problem(self.run, rows)
        spent = time.monotonic() - began
        self._due = began + spent + max(self._every, 15 * spent if self._every else 0.0)

    def head(self) -> dict[str, Any]:
        """What the page says of the run as a whole."""
        rows = list(self.rows.values())
        manifest = self.run.manifest
        updates = sum(row.status.updates for row in rows)
        states = states_of(rows)
        rewards = [row.reward for row in rows if row.reward is not None]
        rests = all(state in FINAL_STATES for state in states)
        return {
            "title": clipped(self.run.name, 100),
            "description": clipped(manifest.get("description"), 1000),
            "created": finite(self.run.created),
            "cells": len(rows),
            "configurations": len({row.cell.group for row in rows}),
            "states": {state: states[state] for state in self.order(states)},
            "update": min(sum(row.status.update for row in rows), 2**53),
            "updates": min(updates, 2**53),
            "left": None if rests or self._left is None else round(self._left, -1),
            "at": max((round(row.at) for row in rows if row.at is not None), default=None),
            "reward": finite(sum(rewards) / len(rewards)) if rewards else None,
            "problem": self._problem,
            "report": self.report(),
        }

    @property
    def axes(self) -> list[dict[str, Any]]:
        """The varied axes with their values."""
        return self._axes

    @staticmethod
    def order(states: Iterable[str]) -> list[str]:
        """States in the order of `klab status`."""
        known = [state for state in STATES if state in states]
        return [*known, *sorted(set(states) - set(known))]

    def report(self) -> float | None:
        """When the report's page was written, in seconds since 1970; None where there is none."""
        page = self.run.report / "index.html"
        if self.run.report.is_symlink() or page.is_symlink() or not page.is_file():
            return None
        return round(page.stat().st_mtime)

    def newest(self, most: int) -> list[Row]:
        """The cells that were heard of last, newest first."""
        heard = [row for row in self.rows.values() if row.at is not None]
        return sorted(heard, key=lambda row: (-(row.at or 0.0), row.cell.place))[:most]

    def begun(self, most: int) -> list[str]:
        """The configurations that are drawn where nobody has chosen: the baseline, and the first with updates."""
        groups = dict.fromkeys(row.cell.group for row in self.rows.values() if row.status.update > 0)
        baseline = [self.run.baseline] if self.run.baseline in groups else []
        return list(dict.fromkeys([*baseline, *groups]))[:most]

    def cells_of(self, group: str) -> list[Row]:
        """The cells of a configuration."""
        return [row for row in self.rows.values() if row.cell.group == group]

    def _update(self, found: Sequence[CellStatus]) -> None:
        for status in found:
            cell, snapshot = self._by_id[status.id], self._watcher.snapshots[status.id]
            self.rows[status.id] = row_of(cell, status, snapshot, self._watcher.ended_at.get(status.id))
        self.version += 1

    def _replace_pending(self, found: Sequence[CellStatus]) -> None:
        cells = self.run.manifest["cells"]
        self.rows = {identity: row for identity, row in self.rows.items() if identity in cells}
        for place, status in enumerate(found, len(cells)):
            cell = Identity(status.id, place, status.id, status.id, None, frozenset())
            self.rows[status.id] = row_of(cell, status, None, None)
        self.version += 1

    def _ask(self) -> list[_Answer]:
        """What the schedulers say of the cells that have no result; each is asked as often as it should be."""
        if all(each.result is not None for each in self._watcher.snapshots.values()) and self.run.tuned is None:
            self._jobs = {}
            return []
        answers = []
        for executor in executors_of(self.run):
            at, states = self._asked.get(executor.name, (-SCHEDULER_SECONDS, {}))
            if executor.name == "local" or time.monotonic() - at >= SCHEDULER_SECONDS:
                states = executor.states(self.run)
                self._asked[executor.name] = (time.monotonic(), states)
            answers.append(_Answer(executor.name, states))
        self._jobs = {name: (answer.name, job) for answer in answers for name, job in answer.states(self.run).items()}
        return answers

    def _stamp(self) -> tuple[int, ...]:
        try:
            status = (self._path / "manifest.json").lstat()
        except OSError:
            return ()
        return status.st_ino, status.st_size, status.st_mtime_ns


class _Answer:
    """What a scheduler said, to whoever asks."""

    def __init__(self, name: str, states: dict[str, JobStatus]) -> None:
        self.name = name
        self._states = states

    def states(self, run: Run) -> dict[str, JobStatus]:
        return self._states
