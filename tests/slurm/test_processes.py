"""Cells that several tasks of a job train together, on one node and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from klab.grid import load_grid
from klab.harness.dispatch.slurm.submission import submissions
from klab.harness.store import Run
from tests.slurm.conftest import Lab, starts
from tests.slurm.processes import facts, kill, processes, wait_for
from tests.support.small_cells import assert_same

pytestmark = pytest.mark.slurm

SLOW = {"task": {"seconds": 0.06}, "training": {"updates": 80, "prompts": 3, "checkpoint_updates": 5}}


def task(job: str, rank: int) -> int:
    """The process of one task of a job."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    (found,) = (
        pid
        for pid in processes()
        if b"submitit.core._submit" in facts(pid, "cmdline").split(b"\0")
        and wanted <= set(facts(pid, "environ").split(b"\0"))
    )
    return found


TRAIN = """
import sys
from pathlib import Path
from klab.harness.dispatch.job import run_job
states = run_job(Path(sys.argv[1]), tuple(sys.argv[2:]), executor="here", processes=2)
sys.exit(set(states.values()) != {"finished"})
"""


def trained_by_two_here(lab: Lab, grid: Path) -> Run:
    """The grid's cells after one quiet life in two processes of this machine."""
    run = Run.create(lab.folder / "quiet" / grid.stem, load_grid(grid))
    command = [sys.executable, "-c", TRAIN, str(run.path), *run.cells]
    subprocess.run(command, check=True, env=os.environ | {"KLAB_TEST_HURRY": "1"})
    return run


def test_two_processes_on_one_node_or_two_have_the_bits_of_two_here(lab: Lab) -> None:
    """The job on one node is requeued in the middle, the other one loses a process to SIGKILL and is launched again."""
    grid = lab.grid("pair", **SLOW, resources={"processes": 2})
    apart = lab.grid("apart", **SLOW, resources={"nodes": 2, "minutes": 30})
    pair, far = lab.launch(grid), lab.launch(apart)
    assert all(
        "--kill-on-bad-exit=1" in (each.folder / f"{each.job}_submission.sh").read_text()
        for run in (pair, far)
        for each in submissions(run)
    )
    lab.until_update(far, 8)
    job = lab.job(far)
    assert "NumNodes=2" in lab.tell("scontrol", "show", "job", "-o", job)
    kill(task(job, 1))
    lab.until_update(pair, 8)
    lab.tell("scontrol", "requeue", lab.job(pair))
    rows = lab.until(far, lambda rows: rows[0].state == "failed", 60)
    assert rows[0].detail == "FAILED, signal 9"
    lab.launch(apart, "--retry-failed")
    lab.until_finished(pair)
    lab.until_finished(far)
    assert starts(pair) == starts(far) == [2]
    quiet = trained_by_two_here(lab, grid)
    assert_same(pair, quiet)
    assert_same(far, quiet)


def test_weights_shared_out_over_two_nodes_survive_the_death_of_one_task(lab: Lab) -> None:
    """The other task says who died; launched again, the cell ends with the bits of two undisturbed processes here."""
    grid = lab.grid("shared", **SLOW, policy_settings={"sharding": "full"}, resources={"nodes": 2, "interface": "lo"})
    run = lab.launch(grid)
    lab.until_update(run, 8)
    job, victim = lab.job(run), task(lab.job(run), 1)
    kill(victim)
    lab.until(run, lambda rows: rows[0].state == "failed", 60)
    wait_for("the job to end", lambda: not lab.tell("squeue", "-h"), 30)
    logs = "".join(file.read_text(errors="replace") for file in run.jobs.rglob(f"*{job}*") if file.is_file())
    assert f", pid {victim}) is gone" in logs
    lab.launch(grid, "--retry-failed")
    lab.until_finished(run)
    quiet = trained_by_two_here(lab, grid)
    assert_same(run, quiet)


def test_a_reward_that_raises_in_another_task_fails_the_cell_with_its_words(lab: Lab) -> None:
    run = lab.launch(lab.grid("raises", task={"trouble": "raise"}, resources={"processes": 2}))
    rows = lab.until(run, lambda rows: rows[0].state == "failed", 60)
    assert "the reward is broken" in rows[0].detail
    wait_for("the job to end", lambda: not lab.tell("squeue", "-h"), 30)
    assert starts(run) == [1]
