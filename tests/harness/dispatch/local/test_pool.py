"""The local pool: bounded, patient with the living, and nothing is lost whoever is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from klab.grid import Grid
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.cancel import cancel
from klab.harness.dispatch.launch import launch
from klab.harness.dispatch.local.backend import LocalExecutor
from klab.harness.dispatch.local.controller import run_controller
from klab.harness.dispatch.local.inline import InlineExecutor
from klab.harness.dispatch.local.pool import Pool, RunningJob
from klab.harness.dispatch.local.queue_files import request_path
from klab.harness.dispatch.status import count, statuses
from klab.harness.store import Run, files, scan
from tests.support.run_processes import controllers, kill, wait_for, workers

MakeGrid = Callable[..., Grid]


def numbers(run: Run) -> dict[str, Any]:
    """All rows of all cells without timings."""

    def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]

    cells = (run.cell(identity) for identity in run.cells)
    return {cell.id: (bare(cell.metrics()), bare(cell.evaluations())) for cell in cells}


def klab_launch(*options: str) -> subprocess.Popen[bytes]:
    """`klab launch` in a process of its own, as a user starts it."""
    command = [
        sys.executable,
        "-m",
        "klab.harness.cli.main",
        "launch",
        "little.yaml",
        "--no-merge",
        "--no-check",
        "--max-parallel",
        "2",
        *options,
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def progress(run: Run) -> int:
    """Updates recorded so far."""
    return sum(int((run.cell(identity).last_metrics() or {"update": 0})["update"]) for identity in run.cells)


def test_whoever_is_killed_the_numbers_are_those_of_an_undisturbed_run(make_grid: MakeGrid, place: Path) -> None:
    """SIGKILL of launcher, worker and controller, SIGTERM of a worker, while training; then launching again."""
    grid = make_grid(
        cells=[{"estimator": "k3"}, {"estimator": "k1"}],
        seeds=2,
        updates=50,
        checkpoint_updates=4,
        task={"name": "slow_tasks:Chore", "seconds": 0.006},
        resources={"cells_per_job": 2},
    )
    quiet = Run.create(place / "quiet", grid)
    launch(quiet, InlineExecutor(), workers=1)

    launcher = klab_launch()
    run = wait_for(lambda: (place / "runs/little/manifest.json").exists() and Run.open(place / "runs/little"))
    wait_for(lambda: progress(run) > 12)
    kill(launcher.pid)
    launcher.wait()
    first, second = wait_for(lambda: len(workers(run)) == 2 and workers(run))
    kill(first)
    wait_for(lambda: first not in workers(run) and len(workers(run)) == 2)  # the controller starts another one
    kill(*controllers(run))
    assert second in workers(run)  # jobs go on without it
    kill(second, number=signal.SIGTERM)
    wait_for(lambda: second not in workers(run))
    again = [klab_launch(), klab_launch()]  # two launchers at once
    (controller,) = wait_for(lambda: controllers(run))
    run_controller(run.path)  # a second controller leaves at once
    assert controllers(run) in ([controller], [])
    assert [process.wait(timeout=600) for process in again] == [0, 0]

    assert count(statuses(run)) == {"finished": 4}
    assert numbers(run) == numbers(quiet)
    assert [row["update"] for row in run.cell(run.cells[0]).metrics()] == list(range(1, 51))
    lives = [event for identity in run.cells for event in run.cell(identity).attempts() if event["event"] == "started"]
    assert 6 <= len(lives) <= 12
    wait_for(lambda: not controllers(run))
    assert (run.jobs / "controller.log").read_text() == ""


def test_a_cancelled_cell_leaves_its_pack_and_a_new_launch_takes_it_up(make_grid: MakeGrid, place: Path) -> None:
    grid = make_grid(
        seeds=3,
        updates=40,
        checkpoint_updates=5,
        task={"name": "slow_tasks:Chore", "seconds": 0.01},
        resources={"cells_per_job": 2},
    )
    run = Run.create(place / "runs/little", grid)
    local = LocalExecutor(max_parallel=1)
    launch(run, local, workers=1)
    mate, stopped, queued = run.cells
    assert statuses(run)[2].state == "queued"
    assert "place" not in (files.read_record(request_path(run)) or {})  # packs as asked for are not made anew
    wait_for(lambda: statuses(run)[1].update >= 2)
    assert [row.state for row in statuses(run)] == ["running", "running", "queued"]
    assert len(workers(run)) == 1
    cancel(run, [stopped, queued])
    wait_for(lambda: [row.state for row in statuses(run)] == ["finished", "cancelled", "cancelled"])
    wait_for(lambda: not controllers(run))
    assert not (run.path / "cells" / queued / "metrics.jsonl").exists()
    assert run.cell(stopped).result() is None
    assert len(run.cell(mate).metrics()) == 40

    launch(run, local, workers=1)
    wait_for(lambda: count(statuses(run)) == {"finished": 3})
    assert [row["update"] for row in run.cell(stopped).metrics()] == list(range(1, 41))


def test_a_process_that_keeps_vanishing_becomes_a_failure_with_a_reason(make_grid: MakeGrid, place: Path) -> None:
    run = Run.create(place / "runs/little", make_grid(task={"name": "slow_tasks:Chore", "die": 9}))
    pool = Pool(run, losses=2)
    pool.replace_queue([Pack(tuple(run.cells))], slots=1, threads=1, gpus=[])
    wait_for(lambda: pool.step() and not pool.running and not pool.waiting)
    (row,) = statuses(run)
    assert (row.state, Path("deaths").read_text()) == ("failed", "xx")
    assert "died 2 times" in row.detail


def test_at_most_so_many_jobs_at_a_time_and_one_gpu_each(make_grid: MakeGrid, place: Path) -> None:
    """Five packs on two slots and two devices; each process is stopped at its claim by a cell that takes its time."""
    grid = make_grid(seeds=3, updates=2, task={"name": "slow_tasks:Chore", "seconds": 0.05})
    run = Run.create(place / "runs/little", grid)
    pool = Pool(run)
    pool.replace_queue([Pack((identity,)) for identity in run.cells], slots=2, threads=1, gpus=["7", "9"])
    most: list[int] = []
    gpus: set[tuple[str, ...]] = set()

    def step() -> bool:
        pool.step()
        most.append(len(pool.running))
        held = [str((each.claim or {}).get("gpu")) for each in scan(run).values() if each.alive]
        gpus.add(tuple(sorted(held)))
        return not pool.running and not pool.waiting

    wait_for(step)
    assert max(most) == 2
    assert count(statuses(run)) == {"finished": 3}
    assert gpus <= {(), ("7",), ("9",), ("7", "9")}
    assert {("7",), ("9",)} & gpus or ("7", "9") in gpus


def test_more_jobs_than_devices_are_spread_evenly(make_grid: MakeGrid, place: Path) -> None:
    pool = Pool(Run.create(place / "runs/little", make_grid()))
    pool.gpus = ["0", "1", "MIG-2", "3"]
    chosen = []
    for number in range(8):
        chosen.append(pool.next_gpus())
        pool.running.append(RunningJob((str(number),), pid=number, gpu=chosen[-1]))
    assert chosen == 2 * pool.gpus
    pool.running = [each for each in pool.running if each.gpu != "1"]
    assert pool.next_gpus() == "1"
    pool.processes = 2
    assert pool.next_gpus() == "1,0"


def test_a_failed_cell_waits_for_retry_failed(make_grid: MakeGrid, place: Path) -> None:
    grid = make_grid(seeds=2, task={"name": "slow_tasks:Chore", "fail_unless": str(place / "there")})
    run = Run.create(place / "runs/little", grid)
    assert len(launch(run, InlineExecutor(), workers=1).packs) == 1
    rows = statuses(run)
    assert [row.state for row in rows] == ["failed", "failed"]
    assert "the file is not there" in rows[0].detail
    (place / "there").touch()
    assert launch(run, InlineExecutor(), workers=1).packs == ()
    launch(run, InlineExecutor(), workers=1, retry_failed=True)
    assert count(statuses(run)) == {"finished": 2}
    events = [event["event"] for event in run.cell(run.cells[0]).attempts()]
    assert events == ["started", "ended", "relaunched", "started", "ended"]


def test_launching_leaves_running_cells_alone(make_grid: MakeGrid, place: Path) -> None:
    run = Run.create(place / "runs/little", make_grid(seeds=2))
    folder = run.cell(run.cells[0])
    folder.claim()
    try:
        launched = launch(run, InlineExecutor(), workers=1)
    finally:
        folder.release_claim()
    assert [pack.cells for pack in launched.packs] == [(run.cells[1],)]
    assert not folder.metrics()
    before = time.time()
    assert run.cell(run.cells[1]).attempts()[0]["at"] <= before


def test_a_damaged_cell_fails_alone_and_is_named(make_grid: MakeGrid, place: Path) -> None:
    run = Run.create(place / "runs/little", make_grid(seeds=3))
    for identity, name in zip(run.cells, ("result.json", "attempts.jsonl"), strict=False):
        run.cell(identity).write_heartbeat({"update": 1})
        (run.cell(identity).path / name).write_text("{}\n")
    launch(run, InlineExecutor(), workers=1, retry_failed=True)
    rows = statuses(run)
    assert [row.state for row in rows] == ["failed", "failed", "finished"]
    assert ["result.json" in rows[0].detail, "attempts.jsonl" in rows[1].detail] == [True, True]
