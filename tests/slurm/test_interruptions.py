"""Preemption, time limits, requeues, dead nodes, a dead controller: cells end with the bits of an undisturbed life."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from klab.harness.dispatch.launch import launch
from klab.harness.dispatch.slurm.backend import SlurmExecutor
from klab.harness.dispatch.slurm.submission import submissions
from klab.harness.dispatch.status import statuses
from klab.harness.store import Run
from tests.slurm.conftest import Lab, starts
from tests.slurm.processes import wait_for
from tests.support.small_cells import assert_same

pytestmark = pytest.mark.slurm

SLOW = {"task": {"seconds": 0.04}, "training": {"updates": 60, "checkpoint_updates": 5}}
"""A cell of some twelve seconds."""

UNSAVED = {"updates": 60, "checkpoint_updates": 10_000, "checkpoint_seconds": 10_000}
"""Nothing is saved but for a signal."""


@pytest.fixture
def without_user_signal(lab: Lab) -> Iterator[None]:
    lab.cluster.user_signal = False
    lab.cluster.start()
    yield
    lab.cluster.user_signal = True
    lab.cluster.start()


def preempted(lab: Lab, name: str) -> None:
    """A cell in the partition `low` gives way to a job in `high`, and ends as if nothing had happened."""
    grid = lab.grid(
        name,
        task=SLOW["task"],
        training=UNSAVED,
        resources={"partition": "low", "sbatch": {"exclusive": True, "nodelist": "n1"}},
    )
    run = lab.launch(grid)
    lab.until_update(run, 12)
    lab.tell("sbatch", "-p", "high", "-w", "n1", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    lab.until(run, lambda rows: rows[0].state == "preempted", 30)
    assert any(run.cell(run.cells[0]).checkpoint.iterdir())  # saved because of the signal: its own schedule is far off
    lab.until_finished(run)
    assert starts(run) == [2]
    assert_same(run, lab.undisturbed(grid))


def test_preemption_with_the_jobs_own_signal(lab: Lab) -> None:
    preempted(lab, "preempted")


@pytest.mark.usefixtures("without_user_signal")
def test_preemption_with_sigterm_only(lab: Lab) -> None:
    preempted(lab, "terminated")


def test_a_time_limit_hit_at_least_twice(lab: Lab) -> None:
    """Some eighty seconds of work in jobs of one minute."""
    grid = lab.grid("limited", task={"seconds": 0.2}, training={**UNSAVED, "updates": 95})
    run = lab.launch(grid, "--minutes", "1")
    lab.until_finished(run, 400)
    assert starts(run)[0] >= 3
    print(f"time limit hit {starts(run)[0] - 1} times")
    assert_same(run, lab.undisturbed(grid))


def test_requeued_from_outside(lab: Lab) -> None:
    grid = lab.grid("requeued", **SLOW)
    run = lab.launch(grid)
    for update, lives in ((8, 1), (20, 2)):
        lab.until_update(run, update)
        assert starts(run) == [lives]
        lab.tell("scontrol", "requeue", lab.job(run))
        wait_for("the next life", lambda lives=lives: starts(run) == [lives + 1], 60)  # type: ignore[misc]
    lab.until_finished(run)
    assert_same(run, lab.undisturbed(grid))


def test_a_node_dies_under_its_jobs_and_comes_back(lab: Lab) -> None:
    grid = lab.grid("node", seeds=2, **SLOW, resources={"sbatch": {"nodelist": "n2"}})
    run = lab.launch(grid)
    lab.until_update(run, 8)
    lab.cluster.kill_node("n2")
    rows = lab.until(run, lambda rows: all(row.state == "preempted" for row in rows), 30)
    assert all(row.job for row in rows)
    lab.launch(grid)
    lab.cluster.revive_node("n2")
    lab.until_finished(run)
    assert starts(run) == [2, 2]
    assert_same(run, lab.undisturbed(grid))


def test_cancelled_from_outside_and_taken_up_again(lab: Lab) -> None:
    """A running job, and one element of a waiting array, which Slurm then forgets."""
    grid = lab.grid("outside", seeds=3, **SLOW)
    run = lab.launch(grid, "--max-parallel", "1")
    lab.until_update(run, 8)
    array = lab.job(run).split("_")[0]
    lab.tell("scancel", f"{array}_2")
    lab.tell("scancel", f"{array}_0")
    gone = ("cancelled", "lost", "waiting")
    lab.until(run, lambda rows: rows[0].state in gone and rows[2].state in gone, 30)
    lab.launch(grid)
    lab.until_finished(run)
    assert starts(run) == [2, 1, 1]
    assert_same(run, lab.undisturbed(grid))


def test_the_controller_is_down_during_status_and_launch(lab: Lab) -> None:
    """It ends by SIGTERM, with which it saves its state: killed, it may forget jobs of the last seconds (see below)."""
    grid = lab.grid("down", seeds=3, **SLOW)
    run = lab.launch(grid, "--max-parallel", "1")
    lab.until_update(run, 5)
    lab.cluster.stop_daemon("slurmctld")
    try:
        assert [row.state for row in statuses(run)] == ["running", "unknown", "unknown"]
        said = lab.klab("launch", grid, "--on", "slurm")
        assert "0 cells" in said
        more = lab.grid("more")
        assert "Slurm does not answer" in lab.klab("launch", more, "--on", "slurm", code=2)
    finally:
        lab.cluster.start_controller()
    lab.until_finished(run)
    assert starts(run) == [1, 1, 1]
    assert_same(run, lab.undisturbed(grid))
    lab.launch(more)
    lab.until_finished(lab.run(more))


def forgotten(lab: Lab, name: str) -> tuple[Path, Run, str]:
    """Three cells of forty seconds in an array, one at a time, which the controller forgets when the first has started:
    grid, run, number of the array. The accounts, where there are any, have heard of it before.

    The first node says that it runs a job that the controller does not know, and is told to end it. It remembers the
    number for a while, and starts no other job that has it: what comes next has to run on other nodes.
    """
    lab.cluster.remember(lab.folder / "state")
    grid = lab.grid(name, seeds=3, task={"seconds": 0.1}, training={"updates": 100, "checkpoint_updates": 5})
    run = lab.launch(grid, "--max-parallel", "1", "--exclude", "n2,n3,n4")
    lab.until_update(run, 8)
    array = lab.job(run).split("_")[0]
    if lab.cluster.accounting:
        wait_for("the accounts", lambda: bool(lab.tell("sacct", "-n", "-X", "-j", array)), 60)
    lab.cluster.forget(lab.folder / "state")
    assert [row.state for row in statuses(run)] == ["running", "waiting", "waiting"]
    rows = lab.until(run, lambda rows: rows[0].state != "running", 60)
    assert [row.state for row in rows] == ["lost", "waiting", "waiting"]
    return grid, run, array


def test_a_controller_that_forgot_the_jobs_gives_their_numbers_to_the_next_launch(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed before it had saved its state, or started from a backup; the first task is another cell's then."""
    grid, run, array = forgotten(lab, "forgot")
    launch(run, SlurmExecutor({"exclude": "n1"}), workers=2, only=run.cells[1:])
    assert [each.job for each in submissions(run)] == [array, array]
    rows = lab.until(run, lambda rows: [row.state for row in rows[1:]] == ["running", "running"], 60)
    assert (rows[0].state, rows[1].job, rows[2].job) == ("lost", f"{array}_0", f"{array}_1")
    lab.klab("cancel", run.path, run.cells[0])
    monkeypatch.setenv("KLAB_TEST_HURRY", "1")
    lab.launch(grid, "--exclude", "n1")
    lab.until_finished(run)
    assert starts(run) == [2, 1, 1]
    assert_same(run, lab.undisturbed(grid))


def test_jobs_of_others_with_the_numbers_of_forgotten_ones_are_left_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, run, array = forgotten(lab, "renumbered")
    said = lab.tell("sbatch", "-J", "another", "--array=0-2", "-x", "n1", "-o", "/dev/null", "--wrap", "sleep 600")
    assert said.split()[-1] == array
    wait_for("the other array", lambda: _others(lab, array) == ["RUNNING"] * 3, 60)
    assert [row.state for row in statuses(run)] == ["lost", "waiting", "waiting"]
    lab.klab("cancel", run.path, "--yes")
    assert [row.state for row in statuses(run)] == ["cancelled"] * 3
    monkeypatch.setenv("KLAB_TEST_HURRY", "1")
    lab.launch(grid, "--exclude", "n1")
    lab.until_finished(run)
    assert _others(lab, array) == ["RUNNING"] * 3
    assert starts(run) == [2, 1, 1]
    assert_same(run, lab.undisturbed(grid))


def _others(lab: Lab, array: str) -> list[str]:
    return lab.tell("squeue", "-h", "-r", "-j", array, "-n", "another", "-o", "%T").split()
