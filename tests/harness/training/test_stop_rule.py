"""Hopeless cells end by their rule: at the same update alone, packed and resumed; what the rule reads, and refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from klab.grid import UserError, parse_grid
from klab.grid.schema.training import StopRule
from klab.harness.training import run_cells
from klab.harness.training.stop_rule import why_hopeless
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, numbers


def rows(*rewards: float | None, kl: float = 1.0) -> list[dict[str, Any]]:
    return [{"update": 10 * place, "reward": reward, "reverse_kl": kl} for place, reward in enumerate(rewards)]


def rule(**settings: Any) -> StopRule:
    return StopRule.model_validate({"after": 20, "unless": {"reward": 0.5}, **settings})


@pytest.mark.parametrize(
    ("settings", "evaluations", "why"),
    [
        ({}, rows(0.1, 0.1), None),  # before `after`
        ({}, rows(0.1, 0.1, 0.4999), "held-out reward 0.4999 at update 20 is below 0.5 (training.stop)"),
        ({}, rows(0.1, 0.1, 0.5), None),
        ({}, rows(0.9, 0.9, 0.9, 0.4), "held-out reward 0.4 at update 30 is below 0.5 (training.stop)"),
        ({"over": 2}, rows(0.0, 0.7, 0.4), None),
        ({"over": 2}, rows(0.9, 0.5, 0.4), "held-out reward 0.45 (mean of 2 evaluations) at update 20 is below 0.5"),
        ({"over": 3}, rows(0.0, 0.0, 0.0), None),  # two evaluations after the first update
        ({}, rows(0.1, 0.1, None), None),  # not measured
        ({"over": 2}, rows(0.1, None, 0.1), None),
        ({"unless": {"reverse_kl": 2}}, rows(0, 0, 0, kl=2.0), None),
        ({"unless": {"reverse_kl": 2}}, rows(0, 0, 0, kl=2.5), "KL to the reference 2.5 at update 20 is above 2"),
        ({"unless": {"reward": 0.5, "reverse_kl": 2}}, rows(0, 0, 0.6, kl=2.5), "KL to the reference"),
        ({"unless": {"reward": 0.5, "reverse_kl": 2}}, rows(0, 0, 0.4, kl=1.0), "held-out reward"),
    ],
)
def test_what_the_rule_says(settings: dict[str, Any], evaluations: list[dict[str, Any]], why: str | None) -> None:
    found = why_hopeless(rule(**settings), evaluations)
    assert found is None if why is None else found is not None and found.startswith(why)


STOP = {"after": 2, "unless": {"reward": 2.0}}  # no reward of this task reaches 2
EVERY = {"updates": 6, "evaluate_every": 2}


def test_a_stopped_cell_has_the_numbers_that_it_has_without_the_rule_up_to_there(make_run: MakeRun) -> None:
    stopped = make_run("stopped", {**EVERY, "stop": STOP})
    assert run_cells(stopped.path, stopped.cells) == {stopped.cells[0]: "stopped"}
    through = finished(make_run("through", EVERY))
    found, whole = numbers(stopped, stopped.cells[0]), numbers(through, through.cells[0])
    assert found["metrics"] == whole["metrics"][:2]
    assert found["evaluations"] == whole["evaluations"][:2]
    assert found["result"]["state"] == "stopped"
    assert found["result"]["updates"] == 2
    assert "is below 2 (training.stop)" in found["result"]["reason"]
    assert stopped.cell(stopped.cells[0]).policy.is_dir()
    assert not stopped.cell(stopped.cells[0]).checkpoint.exists()


@pytest.mark.bits
def test_stopped_packed_is_stopped_alone_and_its_mates_go_on(make_run: MakeRun) -> None:
    cells: list[dict[str, Any]] = [{}, {"training.stop": {"after": 4, "unless": {"reward": 2.0}}}, {"beta": 0.3}]
    packed, alone = make_run("packed", EVERY, cells), make_run("alone", EVERY, cells)
    ends = ["finished", "stopped", "finished"]
    assert list(run_cells(packed.path, packed.cells).values()) == ends
    for identity in alone.cells:
        run_cells(alone.path, [identity])
        assert_same(packed, alone, identity)


@pytest.mark.bits
@pytest.mark.parametrize("checkpoint_updates", [1, 3, 99])
def test_stopped_after_interruptions_is_stopped_undisturbed(make_run: MakeRun, checkpoint_updates: int) -> None:
    training = {**EVERY, "stop": {**STOP, "after": 4}, "checkpoint_updates": checkpoint_updates}
    through, broken = make_run("through", training), make_run("broken", training)
    (identity,) = through.cells
    assert run_cells(through.path, [identity]) == {identity: "stopped"}
    for _ in range(3):
        assert run_cells(broken.path, [identity], stop=StopAfter(1)) == {identity: "interrupted"}
    assert run_cells(broken.path, [identity]) == {identity: "stopped"}
    assert_same(through, broken, identity)
    assert run_cells(broken.path, [identity]) == {identity: "stopped"}


class Death(BaseException):
    """A process that is killed."""


@pytest.mark.bits
def test_a_kill_between_the_evaluation_and_the_end_stops_at_the_same_update(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {**EVERY, "stop": {**STOP, "after": 4}}
    through, broken = make_run("through", training), make_run("broken", training)
    (identity,) = through.cells
    run_cells(through.path, [identity])
    with monkeypatch.context() as patch:

        def die(*_: Any) -> None:
            raise Death

        patch.setattr("klab.harness.training.runner.finalize_cell", die)
        with pytest.raises(Death):
            run_cells(broken.path, [identity])
    assert broken.cell(identity).result() is None
    assert run_cells(broken.path, [identity]) == {identity: "stopped"}
    assert_same(through, broken, identity)


def test_a_bound_that_holds_changes_nothing(make_run: MakeRun) -> None:
    kept = make_run("kept", {**EVERY, "stop": {"after": 2, "unless": {"reward": -1.0, "reverse_kl": 1e6}}})
    through = finished(make_run("through", EVERY))
    assert set(run_cells(kept.path, kept.cells).values()) == {"finished"}
    assert numbers(kept, kept.cells[0]) == numbers(through, through.cells[0])


def grid_of(stop: Any, **training: Any) -> Any:
    sections = {"task": "addition", "training": {"updates": 100, "evaluate_every": 10, "stop": stop, **training}}
    return parse_grid(json.dumps({"name": "study", **sections}), "study.yaml")


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ({"after": 50}, "training.stop.unless: missing"),
        ({"after": 50, "unless": {}}, "training.stop.unless: names no bound"),
        ({"after": 50, "unless": {"rewards": 0.1}}, "did you mean 'reward'"),
        ({"after": 50, "unles": {"reward": 0.1}}, "did you mean 'unless'"),
        ({"after": 50, "unless": {"reverse_kl": -1}}, "training.stop.unless.reverse_kl"),
        ({"after": 95, "unless": {"reward": 0.1}}, "training.stop.after: is never looked at"),
        ({"after": 20, "unless": {"reward": 0.1}, "over": 3}, "is more than the 2 evaluations"),
    ],
)
def test_mistakes_are_named(stop: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        grid_of(stop)
    assert message in str(caught.value)


def test_the_rule_is_part_of_the_cell_only_where_it_is_set() -> None:
    (without,) = grid_of(None).cells
    (with_rule,) = grid_of({"after": 50, "unless": {"reward": 0.1}}).cells
    assert "stop" not in without.resolved()["training"]
    assert with_rule.resolved()["training"]["stop"] == {"after": 50, "unless": {"reward": 0.1}, "over": 1}
    assert without.id != with_rule.id
    assert type(with_rule).from_resolved(with_rule.resolved()) == with_rule
