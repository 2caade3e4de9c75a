"""Rewards that a limit of time decided are counted; parts of a reward are averaged over the scores that have them."""

from __future__ import annotations

from importlib import import_module

from klab.harness.training import run_cells
from klab.harness.training.evaluation import held_out
from klab.harness.training.runner import prepare_cell
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, numbers

OVERDUE = {"name": "letters_task:Overdue"}


def test_they_are_counted_per_update_and_evaluation_and_in_the_result(make_run: MakeRun) -> None:
    task = import_module("letters_task").Overdue
    before = task.overdue
    found = numbers(run := finished(make_run(task=OVERDUE)), run.cells[0])
    scored = task.overdue - before
    per_update = [row["reward_timeouts"] for row in found["metrics"]]
    in_evaluations = [row["reward_timeouts"] for row in found["evaluations"]]
    assert min(sum(per_update), sum(in_evaluations)) > 0
    assert max(per_update) < 16  # of the update's completions, not all
    assert sum(per_update) + sum(in_evaluations) == scored == found["result"]["reward_timeouts"]
    other = numbers(plain := finished(make_run("plain")), plain.cells[0])
    assert not any("reward_timeouts" in row for row in (*other["metrics"], *other["evaluations"], other["result"]))


def test_they_survive_a_checkpoint_and_belong_to_their_minibatch(make_run: MakeRun) -> None:
    training = {"updates_per_rollout": 2, "lag": 1}
    whole, broken = (make_run(name, training, task=OVERDUE, seeds=2) for name in ("whole", "broken"))
    finished(whole)
    for _ in range(3):
        run_cells(broken.path, broken.cells, stop=StopAfter(1))
    finished(broken)
    for identity in whole.cells:
        assert_same(whole, broken, identity)
        assert any(row["reward_timeouts"] for row in numbers(whole, identity)["metrics"])


def test_a_greedy_baseline_counts_too(make_run: MakeRun) -> None:
    task = import_module("letters_task").Overdue
    before = task.overdue
    run = finished(make_run(task=OVERDUE, objectives=[{"advantage": "greedy_baseline"}]))
    found = numbers(run, run.cells[0])
    assert sum(row["reward_timeouts"] for row in (*found["metrics"], *found["evaluations"])) == task.overdue - before


def test_a_part_is_averaged_over_the_scores_that_have_it(make_run: MakeRun) -> None:
    run = make_run(task=OVERDUE)
    member = prepare_cell(run, run.cell(run.cells[0]))[0]
    early = [example.prompt[1] in "ab" for example in held_out(member)]
    assert any(early)
    assert not all(early)
    for row in numbers(finished(run), run.cells[0])["evaluations"]:
        assert row["parts"]["early"] == 1.0
        assert set(row["parts"]) == {"length", "early"}
