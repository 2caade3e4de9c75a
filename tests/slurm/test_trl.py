"""Cells on TRL whose ranks a launcher starts on two nodes: signals, requeues, a rank that is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from klab.grid import load_grid
from klab.harness.engines.trl.launcher import ATTEMPT
from klab.harness.store import Run
from tests.slurm.conftest import Lab, starts
from tests.slurm.processes import facts, kill, living, processes, wait_for
from tests.support.accelerate_config import write_configuration
from tests.support.small_cells import numbers
from tests.support.training_records import close

pytestmark = pytest.mark.slurm

TRAINING = {"engine": "trl", "updates": 40, "updates_per_rollout": 2, "checkpoint_updates": 6}
UNSAVED = {**TRAINING, "checkpoint_updates": 10_000, "checkpoint_seconds": 10_000}
"""Nothing is saved but for a signal."""

WAIT = 300.0
"""Seconds that processes may take to start, several at a time on few cores."""

TRAIN = """
import sys
from pathlib import Path
from klab.harness.dispatch.job import run_job
states = run_job(Path(sys.argv[1]), tuple(sys.argv[2:]), executor="here", processes=2)
sys.exit(set(states.values()) != {"finished"})
"""


@contextmanager
def trained_here(lab: Lab, grid: Path) -> Iterator[Run]:
    """The grid's cell, trained by two processes of this machine, undisturbed, while the block does something else."""
    run = Run.create(lab.folder / "quiet" / grid.stem, load_grid(grid))
    command = [sys.executable, "-c", TRAIN, str(run.path), *run.cells]
    training = subprocess.Popen(command, env=os.environ | {"KLAB_TEST_HURRY": "1"})
    try:
        yield run
        assert training.wait(WAIT) == 0
    finally:
        training.kill()
        training.wait()


def belonging_to(run: Run) -> dict[int, str]:
    """The living launchers and ranks of a run's attempts: by process number, the node's number in its job."""
    found = {}
    for pid in processes():
        variables = dict(each.partition(b"=")[::2] for each in facts(pid, "environ").split(b"\0"))
        if variables.get(ATTEMPT.encode(), b"").startswith(str(run.path).encode()) and living(pid):
            found[pid] = variables.get(b"SLURM_PROCID", b"").decode()
    return found


def rank_on(run: Run, node: str) -> int:
    """The process that trains the cell on one of the nodes."""
    (found,) = (
        pid
        for pid, where in belonging_to(run).items()
        if where == node and b"\0RANK=" in facts(pid, "environ") and b".worker\0" in facts(pid, "cmdline")
    )
    return found


def rows_of_checkpoint(run: Run) -> list[dict[str, Any]]:
    """The rows of the first life that the next one goes on from."""
    folder = run.cell(run.cells[0])
    (saved,) = folder.checkpoint.glob("checkpoint-*/klab.json")
    update = int(saved.parent.name.removeprefix("checkpoint-"))
    assert update >= 4
    return folder.metrics()[:update]


def assert_close(disturbed: Run, quiet: Run) -> None:
    """Every update once, and the numbers and weights of an undisturbed life but for rounding."""
    assert disturbed.cells == quiet.cells
    (cell,) = quiet.cells
    rows = disturbed.cell(cell).metrics()
    assert [row["update"] for row in rows] == list(range(1, TRAINING["updates"] + 1))  # type: ignore[operator]
    mine, theirs = (
        {key: value for key, value in numbers(run, cell).items() if key != "policy"} for run in (disturbed, quiet)
    )
    close(mine, theirs, cell, 1e-5, 1e-6)
    weights = [load_file(run.cell(cell).policy / "model.safetensors") for run in (disturbed, quiet)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-5, atol=1e-6)


def test_launchers_on_two_nodes_survive_a_time_limits_signal_and_a_killed_rank(lab: Lab) -> None:
    """One job, by accelerate, gets the signal of a time limit in the middle, saves and is requeued; of another, by
    torchrun, a rank is killed, which ends it, and it is launched again. Both end as two processes here, undisturbed."""
    configuration = write_configuration(lab.folder / "accelerate.yaml")
    nodes = {"nodes": 2, "minutes": 30}
    task = {"seconds": 0.1}
    signalled = lab.grid(
        "signalled",
        task=task,
        training=UNSAVED,
        resources={**nodes, "launcher": {"accelerate": str(configuration)}, "interface": "lo"},
    )
    killed = lab.grid("killed", task=task, training=TRAINING, resources={**nodes, "launcher": "torchrun"})
    one = lab.launch(signalled)
    lab.until_update(one, 4, WAIT)
    lab.tell("scancel", "--signal=USR2", lab.job(one))
    wait_for("the next life", lambda: starts(one) == [2], 120)
    kept = {one: rows_of_checkpoint(one)}

    other = lab.launch(killed)
    lab.until_update(other, 8, WAIT)
    kill(rank_on(other, "1"))
    with trained_here(lab, killed) as quiet:
        rows = lab.until(other, lambda rows: rows[0].state == "failed", 120)
        assert rows[0].detail.startswith("FAILED"), rows[0].detail
        wait_for("the ranks of the killed job to end", lambda: not belonging_to(other), 30)
        kept[other] = rows_of_checkpoint(other)
        lab.launch(killed, "--retry-failed")
        lab.until_finished(one)
        lab.until_finished(other)
    assert starts(one) == starts(other) == [2]
    assert (other.cell(other.cells[0]).result() or {})["hardware"]["processes"] == 2
    for run, before in kept.items():
        assert run.cell(run.cells[0]).metrics()[: len(before)] == before  # with their seconds: they were not made again
        assert_close(run, quiet)
