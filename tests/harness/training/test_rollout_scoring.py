"""Rewards that are computed for many completions at once: the same numbers, limits and messages."""

from __future__ import annotations

from typing import Any

import pytest
from batch_task import ASKED, Together

from klab.harness.training import run_cells
from tests.support.training_records import MakeRun, finished, numbers


def test_a_task_that_scores_many_at_once_is_asked_once_per_rollout(make_run: MakeRun) -> None:
    ASKED.clear()
    training = {"updates": 2, "final_evaluation_samples": 3}
    one = finished(make_run("one", training))
    run = finished(make_run("together", training, task={"name": "batch_task:Together"}))
    mine, theirs = numbers(run, run.cells[0]), numbers(one, one.cells[0])
    assert mine["metrics"] == theirs["metrics"]
    assert mine["evaluations"] == theirs["evaluations"]
    # two evaluations of 6 greedy and 18 sampled completions, two rollouts of 16
    assert sorted(ASKED) == [6, 6, 16, 16, 18, 18]


@pytest.mark.parametrize(
    ("trouble", "seconds", "said"),
    [
        ("raise", 600, "RuntimeError: the fourth is broken"),
        ("hang", 1, "TimeLimitExceeded: no answer within 1 s"),
        ("end", 600, "StopIteration"),
    ],
)
def test_the_completion_whose_turn_it_was_is_named(make_run: MakeRun, trouble: str, seconds: int, said: str) -> None:
    task: dict[str, Any] = {"name": "batch_task:Together", "trouble": trouble}
    run = make_run(training={"reward_seconds": seconds}, task=task)
    assert run_cells(run.path, run.cells) == {run.cells[0]: "failed"}
    message = str(run.cell(run.cells[0]).error())
    fourth = Together().split("held_out")
    assert said in message
    assert any(f"(prompt {example.prompt!r}, answer" in message for example in fourth)
