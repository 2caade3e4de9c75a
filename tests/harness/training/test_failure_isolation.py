"""Cells that cannot go on: what is a failure, what is a result, and that mates do not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.harness.training.pack import Pack
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, numbers


def result(run: Run, position: int = 0) -> dict[str, Any]:
    found = run.cell(run.cells[position]).result()
    assert found is not None
    return found


def test_a_reward_that_raises_fails_only_its_cell(make_run: MakeRun) -> None:
    cells = [{"training.lr": 0.01}, {"training.lr": 0.02}, {"task.fail_at": "b"}]
    run = make_run(objectives=cells)
    assert list(run_cells(run.path, run.cells).values()) == ["finished", "finished", "failed"]
    text = run.cell(run.cells[2]).error()
    assert text is not None
    last = text.strip().splitlines()[-1]
    assert "the reward of task 'letters' raised RuntimeError: the reward is broken" in last
    assert "prompt '" in last
    assert "completion 'b" in last
    without = finished(make_run("without", objectives=cells[:2]))
    for identity in without.cells:
        assert_same(run, without, identity)


def test_a_custom_objective_that_raises_fails_only_its_cell(make_run: MakeRun) -> None:
    training = {"updates_per_rollout": 2}
    run = make_run("run", training, [{"weight": "letters_task:broken"}, {"weight": "one"}])
    assert list(run_cells(run.path, run.cells).values()) == ["failed", "finished"]
    assert "the objective raised ZeroDivisionError: the weight is broken" in str(run.cell(run.cells[0]).error())
    assert_same(run, finished(make_run("without", training, [{"weight": "one"}])), run.cells[1])


def test_an_error_that_is_nobodys_takes_the_pack_apart(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that suffices for one cell but not for a pack: each goes on alone, from where it was."""
    through, scarce = finished(make_run("through", seeds=3)), make_run("scarce", seeds=3)
    advance = Pack.advance

    def out_of_memory(self: Pack) -> Any:
        if self.done == 4 and len(self.members) > 1:
            raise MemoryError
        return advance(self)

    monkeypatch.setattr(Pack, "advance", out_of_memory)
    assert set(run_cells(scarce.path, scarce.cells).values()) == {"finished"}
    for identity in scarce.cells:
        assert_same(through, scarce, identity)


def test_a_failed_cell_can_be_run_again(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    import letters_task

    through, retried = finished(make_run("through")), make_run("retried")
    identity = retried.cells[0]
    with monkeypatch.context() as patch:
        patch.setattr(letters_task.Letters, "score", lambda *_: 1.0)
        assert run_cells(retried.path, [identity]) == {identity: "failed"}
    assert "a task's score is a tasks.Score, not float" in str(retried.cell(identity).error())
    assert run_cells(retried.path, [identity]) == {identity: "finished"}
    assert retried.cell(identity).error() is None
    assert_same(through, retried, identity)


@pytest.mark.parametrize("reward", ["nan", "inf"])
def test_rewards_that_are_not_finite_diverge_without_touching_the_weights(
    make_run: MakeRun, start: Path, reward: str
) -> None:
    run = make_run(training={"updates": 30}, task={"reward": reward})
    assert run_cells(run.path, run.cells) == {run.cells[0]: "diverged"}
    rows = run.cell(run.cells[0]).metrics()
    assert [row["update"] for row in rows] == list(range(1, 11))
    assert all(row["nonfinite"] and row["reward_mean"] is None for row in rows)
    assert (result(run)["nonfinite_updates"], result(run)["reward_final"]) == (10, None)
    assert result(run)["reason"] == "rewards are not finite (NaN or infinite), 10 updates in a row"
    before, after = (
        load_file(start / "model.safetensors"),
        load_file(run.cell(run.cells[0]).policy / "model.safetensors"),
    )
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_one_cell_diverges_and_its_mates_go_on(make_run: MakeRun) -> None:
    training = {"updates": 12, "updates_per_rollout": 2, "checkpoint_updates": 50}
    run = make_run("run", training, [{"weight": "letters_task:exploding"}, {"weight": "one"}])
    assert list(run_cells(run.path, run.cells).values()) == ["diverged", "finished"]
    assert result(run)["updates"] == 10
    assert_same(run, finished(make_run("without", training, [{"weight": "one"}])), run.cells[1])


def test_weights_that_overflow_diverge(make_run: MakeRun) -> None:
    run = make_run(training={"updates": 30, "lr": 3e38, "clip_norm": None, "evaluate_every": 1})
    assert run_cells(run.path, run.cells) == {run.cells[0]: "diverged"}
    assert result(run)["updates"] < 30
    assert result(run)["reverse_kl_final"] is None


def test_a_cell_all_of_whose_updates_were_skipped_diverged(make_run: MakeRun) -> None:
    run = make_run(training={"updates": 3}, task={"reward": "nan"})
    assert run_cells(run.path, run.cells) == {run.cells[0]: "diverged"}


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "another cell's"])
def test_a_damaged_checkpoint_is_never_believed(make_run: MakeRun, damage: str) -> None:
    through, hurt = finished(make_run("through", seeds=2)), make_run("hurt", seeds=2)
    run_cells(hurt.path, hurt.cells, stop=StopAfter(3))
    mine, other = (hurt.cell(identity).checkpoint / "state.safetensors" for identity in hurt.cells)
    data = bytearray(mine.read_bytes())
    if damage == "torn":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-100] ^= 1
    elif damage == "empty":
        data.clear()
    else:
        data = bytearray(other.read_bytes())
    mine.write_bytes(data)
    assert set(run_cells(hurt.path, hurt.cells).values()) == {"finished"}
    for identity in hurt.cells:
        assert_same(through, hurt, identity)


def test_a_checkpoint_without_its_records_is_not_used(make_run: MakeRun) -> None:
    through, hurt = finished(make_run("through")), make_run("hurt")
    run_cells(hurt.path, hurt.cells, stop=StopAfter(4))
    metrics = hurt.cell(hurt.cells[0]).path / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:2]))
    run_cells(hurt.path, hurt.cells)
    assert_same(through, hurt, hurt.cells[0])


def test_a_cancelled_cell_writes_no_more(make_run: MakeRun) -> None:
    run = make_run(seeds=2)
    lost, kept = run.cells
    run.cell(lost).claim()

    def cancel(progress: Any) -> None:
        if progress.cell == lost and progress.update == 2:
            run.cell(lost).revoke()

    assert run_cells(run.path, run.cells, progress=cancel) == {lost: "cancelled", kept: "finished"}
    assert len(run.cell(lost).metrics()) == 2
    assert run.cell(lost).error() is None
    assert run.cell(lost).result() is None
    run.cell(lost).release_claim()


_LIFE = """
import os, signal, sys, threading
from klab.harness.training import run_cells

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def tell(progress):
    if progress.update == 12:
        threading.Timer(0.005, kill).start()  # in the middle of what comes next
    elif progress.update == 40:
        kill()

run_cells(sys.argv[1], sys.argv[2:], progress=tell)
"""


def test_killed_in_the_middle_and_resumed(make_run: MakeRun) -> None:
    training = {"updates": 60, "updates_per_rollout": 2, "lag": 1, "checkpoint_updates": 7, "evaluate_every": 50}
    training |= {"prompts": 2, "group_size": 2}
    killed = make_run("killed", training, seeds=2)
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parents[3]), str(here.parents[2] / "support")])
    command = [sys.executable, "-c", _LIFE, str(killed.path), *killed.cells]
    process = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert process.returncode == -signal.SIGKILL
    assert 12 <= len(killed.cell(killed.cells[0]).metrics()) <= 40
    assert killed.cell(killed.cells[0]).result() is None
    assert set(run_cells(killed.path, killed.cells).values()) == {"finished"}
    through = finished(make_run("through", training, seeds=2))
    for identity in killed.cells:
        assert_same(through, killed, identity)
        assert [row["update"] for row in numbers(killed, identity)["metrics"]] == list(range(1, 61))
