"""Ranks that torchrun or `accelerate launch` starts, here and on two emulated nodes: how they start, fail and end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from klab.grid import UserError, load_grid
from klab.harness.engines.trl.attempt_folder import AttemptFolder, Kind
from klab.harness.engines.trl.launcher import ATTEMPT, LOOPBACK, Order, Ranks, started_ranks
from klab.harness.engines.trl.run import train_cells
from klab.harness.engines.trl.together import _outcome, dismiss, follow_ranks
from klab.harness.engines.trl.worker import _check_size, _kind
from klab.harness.store import Run
from klab.harness.training.distributed.process_group import ProcessGroupLost, PropagatedError
from tests.slurm.processes import wait_for
from tests.support.accelerate_config import write_configuration
from tests.support.run_folders import TRAINING
from tests.support.training_records import MakeRun, assert_close
from tests.support.trl_cells import ROOT, rank_environment


@pytest.fixture
def _ranks_find_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rank_environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.parity
@pytest.mark.usefixtures("_ranks_find_the_task")
def test_accelerate_here_and_torchrun_on_two_nodes_train_alike(start: Path, tmp_path: Path) -> None:
    """`klab launch` starts two processes by a configuration of accelerate; the same cell on two emulated nodes by
    torchrun, the second of which is told by files what to do."""
    training = {**TRAINING, "engine": "trl", "evaluate_every": 6, "updates_per_rollout": 2}
    grid = {
        "name": "launched",
        "task": {"name": "letters_task:Letters"},
        "policy": {"name": "hf", "model": str(start)},
        "training": training,
        "resources": {
            "processes": 2,
            "memory_gb": 2,
            "launcher": {"accelerate": str(write_configuration(tmp_path / "accelerate.yaml"))},
        },
    }
    file = tmp_path / "launched.yaml"
    file.write_text(json.dumps(grid))
    command = [sys.executable, "-m", "klab.harness.cli.main", "launch", str(file), "--on", "local", "--no-check"]
    done = subprocess.run([*command, "--runs", str(tmp_path / "runs")], cwd=ROOT, capture_output=True, text=True)
    here = Run.open(tmp_path / "runs" / "launched")
    (cell,) = here.cells
    assert done.returncode == 0, (done.stdout, here.cell(cell).error())

    apart = Run.create(tmp_path / "apart", load_grid(file))
    first, second = (Ranks(1, 2, node, LOOPBACK, orders=tmp_path / "orders") for node in (0, 1))
    follower = threading.Thread(target=follow_ranks, args=(apart, second))
    follower.start()
    try:
        states = train_cells(apart.path, apart.cells, ranks=first)
    finally:
        dismiss(first)
        follower.join(60)
    assert states == {cell: "finished"}, apart.cell(cell).error()

    assert [row["update"] for row in here.cell(cell).metrics()] == [1, 2, 3, 4, 5, 6]
    for run in (here, apart):
        result = run.cell(cell).result() or {}
        assert result["hardware"]["processes"] == 2
        assert result["versions"].keys() >= {"trl", "accelerate"}
    assert_close(here, apart, 1e-5, 1e-6)


@pytest.mark.parity
@pytest.mark.usefixtures("_ranks_find_the_task")
def test_a_reward_that_raises_in_one_of_two_processes_fails_its_cell(make_run: MakeRun) -> None:
    run = make_run(training={"engine": "trl", "updates": 2}, task={"fail_rank": 1})
    (cell,) = run.cells
    assert train_cells(run.path, [cell], ranks=Ranks(2)) == {cell: "failed"}
    assert "the reward of task 'letters' raised RuntimeError: the reward is broken" in (run.cell(cell).error() or "")


@pytest.mark.parity
@pytest.mark.usefixtures("_ranks_find_the_task")
def test_nothing_is_left_of_a_launcher_that_is_killed(make_run: MakeRun, tmp_path: Path) -> None:
    """torchrun gives its ranks sessions of their own, which its death leaves behind."""
    run = make_run(training={"engine": "trl"})
    order = Order(run.cells[0], str(tmp_path), LOOPBACK, 29714, False, 1)

    def ranks() -> list[int]:
        found = []
        for process in psutil.process_iter():
            try:
                variables = process.environ()
            except psutil.Error:
                continue
            if variables.get(ATTEMPT, "").startswith(order.attempt) and "RANK" in variables:
                found.append(process.pid)
        return found

    with started_ranks(run.path, Ranks(2), order) as process:
        wait_for("two ranks", lambda: len(ranks()) >= 2, 120)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert ranks()
    assert not ranks()


def test_a_launcher_that_starts_one_process_of_two_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    _check_size(1)
    with pytest.raises(UserError, match="2 processes are to train a cell together, and the launcher has started 1"):
        _check_size(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    _check_size(2)


def test_a_process_that_is_gone_is_no_failure_of_the_cell() -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:41671")
    assert _kind(gone) == _kind(ProcessGroupLost("klab: a process of this job is gone")) == "lost"
    assert _kind(MemoryError()) == _kind(RuntimeError("CUDA out of memory")) == "memory"
    told = PropagatedError("the reward of task 'letters' raised ConnectionError: Connection reset by peer")
    assert _kind(ConnectionError("Connection reset by peer")) == _kind(told) == _kind(ValueError("gloo")) == "error"


def test_what_became_of_an_attempt(tmp_path: Path) -> None:
    """Whose fault it was is said before that a process is gone; what rank 0 has finished stays finished."""

    def after(name: str, *left: tuple[str, Kind, str], state: str | None = None) -> str:
        folder = AttemptFolder(tmp_path / name)
        folder.path.mkdir()
        for who, kind, text in left:
            folder.leave_failure(who, kind, text)
        if state is not None:
            folder.leave_outcome(state)
        return _outcome(folder, 1)

    gone, broken, hungry = (
        ("node-1", "lost", "the processes of node 1 ended with code 1"),
        ("000001", "error", "the weight is broken"),
        ("000002", "memory", "nothing left"),
    )
    assert after("finished", gone, state="finished") == "finished"
    with pytest.raises(MemoryError, match="nothing left"):
        after("hungry", gone, broken, hungry)
    with pytest.raises(UserError, match="the weight is broken"):
        after("broken", gone, broken)
    with pytest.raises(SystemExit, match="ended with code 1: the processes of node 1 ended with code 1"):
        after("gone", gone)
    with pytest.raises(SystemExit, match="their last words are above"):
        after("silent")


def test_the_folder_of_an_attempt_keeps_what_processes_say(tmp_path: Path) -> None:
    folder = AttemptFolder(tmp_path)
    assert folder.outcome() is None
    assert not folder.stop_requested()
    assert not folder.is_over()
    folder.leave_failure("node-1", "lost", "gone")
    folder.leave_failure("000001", "error", "the weight is broken")
    folder.request_stop()
    folder.leave_outcome("interrupted")
    folder.close()
    assert [(each.kind, each.text) for each in folder.failures()] == [
        ("error", "the weight is broken"),
        ("lost", "gone"),
    ]
    assert (folder.outcome(), folder.stop_requested(), folder.is_over()) == ("interrupted", True, True)
