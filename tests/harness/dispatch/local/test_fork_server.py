"""Jobs forked from a warm parent: theirs are the logs, and a parent that dies takes nothing with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from klab.grid import Grid
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.local.pool import Pool
from klab.harness.dispatch.status import count, statuses
from klab.harness.store import Run
from tests.support.run_processes import kill, wait_for, workers


def parent_of(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rfind(")") + 2 :].split()[1])


def test_a_killed_parent_is_made_again_and_its_forks_go_on(make_grid: Callable[..., Grid], place: Path) -> None:
    grid = make_grid(seeds=2, updates=30, task={"name": "slow_tasks:Chore", "seconds": 0.01})
    run = Run.create(place / "runs/little", grid)
    pool = Pool(run)
    pool.replace_queue([Pack((identity,)) for identity in run.cells], slots=1, threads=1, gpus=[])
    (first,) = wait_for(lambda: [pool.step(), workers(run)][1])
    parent = parent_of(first)
    kill(parent)
    wait_for(lambda: parent_of(first) != parent)
    wait_for(lambda: not pool.step() and not pool.running and not pool.waiting)

    assert count(statuses(run)) == {"finished": 2}
    started = [
        event for identity in run.cells for event in run.cell(identity).attempts() if event["event"] == "started"
    ]
    assert [event["attempt"] for event in started] == [1, 1]
    assert started[0]["pid"] == first
    assert str(started[0]["job"]) == str(first)
    assert (run.path / started[0]["log"]).is_file()
