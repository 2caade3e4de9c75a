"""Rewards that take too long, and memory that does not suffice."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest
import torch

from klab.harness.training import pack as pack_module
from klab.harness.training import run_cells
from klab.harness.training.runtime.oom import is_out_of_memory
from klab.harness.training.runtime.timeout import TimeLimitExceeded, time_limit
from klab.harness.training.update import update
from tests.support.training_records import MakeRun, finished, numbers


def spin() -> None:
    while True:
        pass


def test_a_deadline_interrupts_sleep_and_loops_and_leaves_no_alarm() -> None:
    with pytest.raises(TimeLimitExceeded, match="no answer within"), time_limit(0.05):
        time.sleep(5)
    with pytest.raises(TimeLimitExceeded), time_limit(0.05):
        spin()
    with time_limit(600):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_reward_that_hangs_fails_its_cell(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:

    import letters_task

    run = make_run(training={"reward_seconds": 0.1})
    monkeypatch.setattr(letters_task.Letters, "score", lambda *_: time.sleep(5))
    assert run_cells(run.path, run.cells) == {run.cells[0]: "failed"}
    assert "TimeLimitExceeded: no answer within 0.1 s (prompt" in str(run.cell(run.cells[0]).error())


def test_the_time_limit_of_rewards_is_no_part_of_a_cells_identity(make_run: MakeRun) -> None:
    assert make_run("a").cells == make_run("b", training={"reward_seconds": 3}).cells


@pytest.mark.bits
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_tried_again_with_half_the_micro_batch(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory for 8 of the 16 rows of an update: the cell ends like one whose micro-batch was 8 from the beginning."""

    def scarce(*arguments: Any, **named: Any) -> Any:
        if arguments[-1].rows is None or arguments[-1].rows > 8:
            raise error
        return update(*arguments, **named)

    monkeypatch.setattr(pack_module, "update", scarce)
    short = finished(make_run("short"))
    assert "goes on with micro-batches of 8 rows" in capsys.readouterr().out
    monkeypatch.undo()
    small = finished(make_run("small", training={"micro_batch": 8}))
    mine, theirs = numbers(short, short.cells[0]), numbers(small, small.cells[0])
    assert (mine["metrics"], mine["evaluations"]) == (theirs["metrics"], theirs["evaluations"])


def test_out_of_memory_twice_fails_with_the_reason(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def scarce(*arguments: Any, **named: Any) -> Any:
        tried.append(arguments[-1].rows)
        raise MemoryError("nothing left")

    monkeypatch.setattr(pack_module, "update", scarce)
    run = make_run()
    assert run_cells(run.path, run.cells) == {run.cells[0]: "failed"}
    assert tried == [None, 8]
    text = str(run.cell(run.cells[0]).error())
    assert "MemoryError: nothing left" in text
    last = text.strip().splitlines()[-1]
    assert "lower training.micro_batch (8 at a time), or lower training.token_budget (none)" in last
    assert "policy.gradient_checkpointing: true" in last
    assert "policy.lora" in last


def test_a_model_that_does_not_fit_fails_with_what_to_change(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(pack_module, "load_policy", full)
    run = make_run(policy={"gradient_checkpointing": True})
    assert run_cells(run.path, run.cells) == {run.cells[0]: "failed"}
    last = str(run.cell(run.cells[0]).error()).strip().splitlines()[-1]
    assert "policy.lora" in last
    assert "gradient_checkpointing" not in last


def test_what_counts_as_out_of_memory() -> None:
    wrapped = RuntimeError("the objective raised")
    wrapped.__cause__ = MemoryError()
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(None)
