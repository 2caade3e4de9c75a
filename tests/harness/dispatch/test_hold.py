"""Held cells do not start, here or in the pool, until they are released; nothing else changes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Grid
from klab.harness.cli.main import main
from klab.harness.dispatch.cancel import cancel
from klab.harness.dispatch.hold import hold, release
from klab.harness.dispatch.job import run_job
from klab.harness.dispatch.launch import launch
from klab.harness.dispatch.local.backend import LocalExecutor
from klab.harness.dispatch.local.inline import InlineExecutor
from klab.harness.dispatch.local.queue_files import controller_is_alive
from klab.harness.dispatch.status import count, statuses
from klab.harness.store import Run
from tests.support.run_processes import wait_for

MakeGrid = Callable[..., Grid]


def events(run: Run, identity: str) -> list[str]:
    return [event["event"] for event in run.cell(identity).attempts()]


def test_a_held_cell_is_passed_by_until_it_is_released_and_launched(make_grid: MakeGrid, place: Path) -> None:
    run = Run.create(place / "runs/little", make_grid(seeds=3))
    first, second, third = run.cells
    assert hold(run, [second]) == [second]
    assert hold(run, [second]) == []
    for _ in range(2):  # launching again does not release it
        launch(run, InlineExecutor(), workers=1)
        assert {row.id: row.state for row in statuses(run)} == {first: "finished", second: "held", third: "finished"}
    assert run_job(run.path, (second,), executor="local") == {}
    found = release(run, run.cells)
    assert (found.starting, found.waiting) == ((), (second,))
    assert count(statuses(run)) == {"finished": 2, "waiting": 1}
    launch(run, InlineExecutor(), workers=1)
    assert count(statuses(run)) == {"finished": 3}
    assert events(run, second) == ["held", "released", "started", "ended"]
    assert hold(run, run.cells) == []


def test_cells_that_were_cancelled_or_run_are_not_held(make_grid: MakeGrid, place: Path) -> None:
    run = Run.create(place / "runs/little", make_grid(seeds=2))
    gone, runs = run.cells
    cancel(run, [gone])
    run.cell(runs).claim()
    try:
        assert hold(run, run.cells) == []
    finally:
        run.cell(runs).release_claim()
    hold(run, [runs])
    cancel(run, [runs])  # a held cell can be cancelled, and a launch takes it up then
    assert count(statuses(run)) == {"cancelled": 2}
    launch(run, InlineExecutor(), workers=1)
    assert count(statuses(run)) == {"finished": 2}


def test_holding_while_a_job_starts_leaves_the_cell_held_or_lets_it_end(make_grid: MakeGrid, place: Path) -> None:
    """Many races between the worker's start and the hold: a cell that `hold` names trains nothing."""
    run = Run.create(place / "runs/little", make_grid(seeds=10, updates=3))
    for number, identity in enumerate(run.cells):
        worker = threading.Thread(target=run_job, args=(run.path, (identity,)), kwargs={"executor": "local"})
        worker.start()
        for _ in range(number * 100):
            run.cell(identity).claim_holder()
        held = hold(run, [identity], executors=())
        rows = len(run.cell(identity).metrics())
        worker.join()
        state = statuses(run, (), [identity])[0].state
        assert state in ("held", "finished")
        if held and state == "held":
            assert rows == len(run.cell(identity).metrics()) == 0


def test_the_pool_leaves_held_cells_and_takes_them_up_when_they_are_released(
    make_grid: MakeGrid, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"name": "slow_tasks:Chore", "seconds": 0.02}
    run = Run.create(place / "runs/little", make_grid(seeds=4, updates=8, task=task, resources={"cells_per_job": 1}))
    launch(run, LocalExecutor(max_parallel=1, device="cpu"), workers=1)
    wait_for(lambda: count(statuses(run)).get("running"))
    waiting = [row.id for row in statuses(run) if row.state == "queued"][-2:]
    assert hold(run, waiting) == waiting
    wait_for(lambda: not controller_is_alive(run))
    assert count(statuses(run)) == {"finished": 2, "held": 2}
    assert all(not run.cell(identity).metrics() for identity in waiting)
    found = release(run, waiting[:1])  # the pool had ended, and starts again
    assert found.starting == (waiting[0],)
    wait_for(lambda: not controller_is_alive(run))
    assert count(statuses(run)) == {"finished": 3, "held": 1}
    assert release(run, waiting).starting == (waiting[1],)
    wait_for(lambda: count(statuses(run)) == {"finished": 4})


def test_released_while_the_pool_still_works(make_grid: MakeGrid, place: Path) -> None:
    task = {"name": "slow_tasks:Chore", "seconds": 0.03}
    run = Run.create(place / "runs/little", make_grid(seeds=4, updates=8, task=task, resources={"cells_per_job": 1}))
    launch(run, LocalExecutor(max_parallel=1, device="cpu"), workers=1)
    wait_for(lambda: count(statuses(run)).get("running"))
    waiting = [row.id for row in statuses(run) if row.state == "queued"]
    hold(run, waiting)
    time.sleep(0.3)
    assert set(release(run, waiting).starting) == set(waiting)
    wait_for(lambda: count(statuses(run)) == {"finished": 4})
    assert all(events(run, identity).count("started") == 1 for identity in run.cells)


def test_the_commands(make_grid: MakeGrid, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create(place / "runs/little", make_grid(seeds=3))
    assert main(["hold", "little", "s1", "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert shown["held"] == [run.cells[1]]
    assert main(["status", "little"]) == 0
    assert "release with: klab release little CELL" in capsys.readouterr().out
    assert main(["hold", "little"]) == 0
    assert capsys.readouterr().out == "2 waiting cells held\n"
    assert main(["release", "little"]) == 0
    assert "3 more wait for the next `klab launch`" in capsys.readouterr().out
    assert main(["hold", "little", "nothing"]) == 2
