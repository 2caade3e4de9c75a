"""Cells that start alike are evaluated once before the first update, with the bits that each has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import klab.harness.training.evaluation as module
from klab.harness.training.equal_cells import EqualCells
from klab.harness.training.metrics import same_numbers
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from tests.support.training_records import MakeRun

OBJECTIVES = [{"beta": 0.1}, {"beta": 0.2}, {"beta": 0.3, "estimator": "k1"}]


def pack_of(make_run: MakeRun, **settings: Any) -> Pack:
    run = make_run(objectives=OBJECTIVES, seeds=2, **settings)
    return Pack([prepare_cell(run, run.cell(identity))[0] for identity in run.cells])


def drawn(monkeypatch: pytest.MonkeyPatch, pack: Pack) -> tuple[list[int], list[dict[str, Any]]]:
    """Cells per call of `generate` in an evaluation, and its rows without times."""
    sizes: list[int] = []
    generate = module.generate

    def counting(policy: Any, members: Any, *arguments: Any, **named: Any) -> Any:
        sizes.append(len(members))
        return generate(policy, members, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(module, "generate", counting)
        rows = pack.evaluate()
    return sizes, [same_numbers(row) for row in rows]


@pytest.mark.bits
def test_one_of_each_start_and_seed_is_computed_with_equal_bits(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = pack_of(make_run)
    assert [member.cell.seed for member in pack.members] == [0, 1, 0, 1, 0, 1]
    sizes, together = drawn(monkeypatch, pack)
    assert sizes == [1, 2, 2]  # the start's completions; greedy and fresh ones
    alone = [drawn(monkeypatch, pack_of(make_run).select([c]))[1][0] for c in range(len(pack.members))]
    assert together == alone
    assert together[0] == together[2] != together[1]


def test_cells_that_have_learned_are_evaluated_one_by_one(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = pack_of(make_run)
    pack.evaluate()
    pack.advance()
    sizes, rows = drawn(monkeypatch, pack)
    assert sizes == [6, 6]
    assert rows[0] != rows[4]


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": {"lora": {"rank": 2}}},
        {"training": {"reference": {"ema": 0.5}}},
        {"task": {"name": "letters_task:Answering"}},
    ],
    ids=["adapters", "a reference that moves", "an environment"],
)
def test_what_may_differ_is_computed_for_each(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    sizes, _ = drawn(monkeypatch, pack_of(make_run, **settings))
    assert sizes[1:] == [6, 6]


def test_a_task_with_other_prompts_is_not_taken_for_the_same(make_run: MakeRun) -> None:
    pack = pack_of(make_run)
    examples = [list(module.held_out(member)) for member in pack.members]
    examples[2] = examples[2][::-1]
    found = EqualCells.with_equal_starts(pack.settings, pack.members, examples, pack.policy, by_seed=False)
    assert (found.chosen, found.place) == ([0, 2], [0, 0, 1, 0, 0, 0])
    assert found.some("abcdef") == ["a", "c"]
    assert found.all(["x", "y"]) == ["x", "x", "y", "x", "x", "x"]


def test_on_other_devices_every_cell_is_computed(make_run: MakeRun) -> None:
    pack = pack_of(make_run)
    examples = [module.held_out(member) for member in pack.members]
    policy = pack.policy.frozen_copy()
    for name, value in policy.parameters.items():  # type: ignore[attr-defined]
        policy.parameters[name] = value.to("meta")  # type: ignore[attr-defined]
    assert policy.device == torch.device("meta")
    found = EqualCells.with_equal_starts(pack.settings, pack.members, examples, policy, by_seed=False)
    assert found == EqualCells.all_different(6)
