"""A job trains what it claims, and nothing that was cancelled."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Grid
from klab.harness.dispatch.cancel import cancel
from klab.harness.dispatch.job import _claim, run_job
from klab.harness.dispatch.launch import launch
from klab.harness.dispatch.local.inline import InlineExecutor
from klab.harness.dispatch.status import count, statuses
from klab.harness.store import CellFolder, Run


def test_everything_that_a_job_writes_follows_the_umask(make_grid: Callable[..., Grid], place: Path) -> None:
    """A group can share a run folder, the weights in it too."""
    before = os.umask(0o002)
    try:
        run = Run.create(place / "runs/little", make_grid(checkpoint_updates=1))
        launch(run, InlineExecutor(), workers=1)
    finally:
        os.umask(before)
    assert count(statuses(run)) == {"finished": 1}
    closed = [path for path in run.path.rglob("*") if not path.is_symlink() and not path.stat().st_mode & 0o020]
    assert closed == []


def test_a_cell_that_was_cancelled_does_not_start_until_it_is_launched_again(
    make_grid: Callable[..., Grid], place: Path
) -> None:
    run = Run.create(place / "runs/little", make_grid(seeds=2))
    kept, stopped = run.cells
    cancel(run, [stopped])
    assert run_job(run.path, (kept, stopped), executor="local") == {kept: "finished"}
    assert [event["event"] for event in run.cell(stopped).attempts()] == ["cancelled"]
    assert run.cell(stopped).claim_holder() is None
    launch(run, InlineExecutor(), workers=1)
    assert count(statuses(run)) == {"finished": 2}


def test_cancelling_while_a_job_starts_leaves_the_cell_cancelled_or_finished(
    make_grid: Callable[..., Grid], place: Path
) -> None:
    """Many races between the worker's start and the cancellation: whoever is first, no third outcome exists."""
    run = Run.create(place / "runs/little", make_grid(seeds=12, updates=3))
    for number, identity in enumerate(run.cells):
        worker = threading.Thread(target=run_job, args=(run.path, (identity,)), kwargs={"executor": "local"})
        worker.start()
        for _ in range(number * 200):  # from before the claim to far into training
            run.cell(identity).claim_holder()
        cancel(run, [identity], executors=())
        rows = len(run.cell(identity).metrics())
        worker.join()
        (row,) = statuses(run, (), [identity])
        assert row.state in ("cancelled", "finished")
        if row.state == "cancelled":
            assert len(run.cell(identity).metrics()) <= rows + 1


def test_a_cancellation_between_claim_and_start_is_seen(make_grid: Callable[..., Grid], place: Path) -> None:
    """The worker writes its start after the cancellation: the cell's newest event says cancelled even so."""
    run = Run.create(place / "runs/little", make_grid())
    folder = run.cell(run.cells[0])
    folder.append_attempt({"event": "cancelled", "at": time.time()})
    folder.append_attempt({"event": "started", "at": time.time()})
    assert run_job(run.path, (folder.id,), executor="local") == {}
    assert folder.metrics() == []


class Interrupted(CellFolder):
    """A cell's folder in which another process cancels the cell just before the worker's start is recorded."""

    def append_attempt(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "started":
            super().append_attempt({"event": "cancelled", "at": time.time()})
        super().append_attempt(event)


class Overtaken(CellFolder):
    """A cell's folder in which another process finishes the cell just before this one claims it."""

    def claim(self, *, purpose: str = "training", details: dict[str, Any] | None = None) -> None:
        self.write_result({"state": "finished"})
        super().claim(purpose=purpose, details=details)


@pytest.mark.parametrize(("kind", "events"), [(Interrupted, ["cancelled", "started", "cancelled"]), (Overtaken, [])])
def test_what_happens_while_a_worker_claims_a_cell_is_seen(
    make_grid: Callable[..., Grid], place: Path, kind: type[CellFolder], events: list[str]
) -> None:
    run = Run.create(place / "runs/little", make_grid())
    known = run.cell(run.cells[0])
    folder = kind(known.path, known.id, known.resolved)
    assert not _claim(run, folder, {})
    assert [event["event"] for event in known.attempts()] == events
    assert known.claim_holder() is None
