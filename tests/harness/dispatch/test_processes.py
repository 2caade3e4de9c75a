"""Jobs of several processes on this machine, from the command line to the last bit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Grid, UserError
from klab.grid.schema.sections import Resources, load_section
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.launch import launch
from klab.harness.dispatch.local.backend import LocalExecutor
from klab.harness.dispatch.local.inline import InlineExecutor
from klab.harness.dispatch.local.pool import Pool, RunningJob
from klab.harness.dispatch.processes import select_gpu
from klab.harness.dispatch.status import count, statuses
from klab.harness.store import Run
from klab.harness.training.metrics import same_numbers
from klab.harness.training.runner import Progress
from tests.support.run_processes import controllers, followers, kill, wait_for

MakeGrid = Callable[..., Grid]


def numbers(run: Run) -> dict[str, Any]:
    """All rows of all cells without timings, and the weights they ended with."""
    return {
        identity: (
            [same_numbers(row) for row in run.cell(identity).metrics()],
            [same_numbers(row) for row in run.cell(identity).evaluations()],
            (run.cell(identity).policy / "model.safetensors").read_bytes(),
        )
        for identity in run.cells
    }


def test_a_killed_process_ends_its_job_and_the_next_one_has_the_bits_of_the_local_pool(
    make_grid: MakeGrid, place: Path
) -> None:
    """A pack of two cells, undisturbed on the local pool, and here with a SIGKILL for one of the two processes."""
    grid = make_grid(seeds=2, updates=9, prompts=3, resources={"cells_per_job": 2, "processes": 2})
    pooled, broken = Run.create(place / "pooled", grid), Run.create(place / "broken", grid)
    launch(pooled, LocalExecutor(max_parallel=1), workers=1)

    def disturb(told: Progress) -> None:
        if told.update == 5:
            kill(*followers(broken))

    with pytest.raises(SystemExit, match=r"process 0 of 2: process 1 of 2 \(.*, pid \d+\) is gone"):
        launch(broken, InlineExecutor(progress=disturb), workers=1)
    assert [broken.cell(identity).claim_holder() for identity in broken.cells] == [None, None]
    assert count(statuses(broken)).keys() <= {"waiting", "preempted", "lost"}
    launch(broken, InlineExecutor(), workers=1)
    wait_for(lambda: count(statuses(pooled)) == {"finished": 2})
    assert numbers(broken) == numbers(pooled)
    for run, lives in ((pooled, 1), (broken, 2)):
        started = [event for event in run.cell(run.cells[0]).attempts() if event["event"] == "started"]
        assert [event["processes"] for event in started] == [2] * lives
        assert run.cell(run.cells[0]).result()["hardware"]["processes"] == 2  # type: ignore[index]
        wait_for(lambda run=run: not controllers(run) and not followers(run))  # type: ignore[misc]


def test_a_process_that_cannot_start_ends_the_job_at_once(
    make_grid: MakeGrid, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(place / "run", make_grid(resources={"processes": 2}))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match="process 1 of 2 ended at its start with code 1"):
        launch(run, InlineExecutor(), workers=1)
    assert [event["event"] for event in run.cell(run.cells[0]).attempts()] == ["started", "ended"]
    assert run.cell(run.cells[0]).claim_holder() is None


def test_each_process_has_a_gpu_of_its_own(make_grid: MakeGrid, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"resources\.processes: each process needs a GPU of its own.* 2 of them"):
        load_section("resources", {"gpus": 2, "processes": 3})
    assert Resources(gpus=4).processes_per_node == 4
    assert (Resources().processes_per_node, Resources(processes=3).processes_per_node) == (1, 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    local = LocalExecutor()
    assert [local.processes(Resources(gpus=gpus)) for gpus in (0, 1, 2, 8)] == [1, 1, 2, 4]
    assert (local.slots(1, 2), local.slots(1, 3), LocalExecutor(device="cpu").processes(Resources(gpus=4))) == (2, 1, 1)
    with pytest.raises(UserError, match="there are 4 here"):
        local.processes(Resources(processes=5))
    select_gpu(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    select_gpu(1)  # a scheduler that hands out one per process leaves no choice
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"

    pool = Pool(Run.create(place / "run", make_grid()))
    assert pool.next_gpus() is None
    pool.replace_queue([], slots=2, threads=1, gpus=["7", "9", "2", "1"], processes=2)
    assert pool.next_gpus() == "7,9"
    pool.running.append(RunningJob(("one",), gpu="9,7"))
    assert pool.next_gpus() == "2,1"
    pool.running.append(RunningJob(("other",), gpu="1"))
    assert pool.next_gpus() == "2,7"


def test_gpus_go_to_the_least_loaded_and_running_cells_do_not_wait_again(
    make_grid: Callable[..., Grid], place: Path
) -> None:
    pool = Pool(Run.create(place / "run", make_grid()))
    pool.running += [RunningJob((name,), gpu=gpu) for name, gpu in (("one", "7"), ("two", "9"), ("three", "7"))]
    pool.replace_queue([Pack(("one", "four")), Pack(("two",))], slots=4, threads=1, gpus=["7", "9"])
    assert list(pool.waiting) == [Pack(("four",))]
    assert pool.next_gpus() == "9"
