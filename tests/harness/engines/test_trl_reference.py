"""Reference policies that move, and β schedules, on TRL: as on klab's own engine, resumed to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from klab.grid import UserError
from klab.harness.engines.trl.cell import reset_accelerate
from klab.harness.engines.trl.crosscheck import crosscheck
from klab.harness.engines.trl.run import train_cells
from tests.support.training_records import MakeRun, StopAfter, numbers
from tests.support.trl_cells import trainer_of, trl_cell

RULES: dict[str, dict[str, Any]] = {
    "reset": {"reference": {"update_every": 2}},
    "trailing, rollouts of two updates": {"reference": {"ema": 0.75}, "updates_per_rollout": 2},
    "the policy that drew the rollout": {"reference": "rollout", "updates_per_rollout": 3},
    "a falling beta": {"beta_control": {"schedule": "cosine", "updates": 4}},
}


@pytest.mark.parametrize("training", RULES.values(), ids=RULES.keys())
def test_both_engines_have_the_same_losses_and_weights(start: Path, training: dict[str, Any]) -> None:
    """Six updates on klab's rollouts: as close as with a fixed reference, which has other losses in the end."""
    objective = {"beta": 0.5, "advantage": "group_center"}
    cell = trl_cell(start, objective, **{"updates": 6, "lr": 0.02, **training})
    differences = crosscheck(cell, 6, "float64")
    assert len(differences) == 6
    for each in differences:
        assert each.loss_trl == pytest.approx(each.loss_klab, rel=1e-4, abs=1e-6)
        assert each.gradient < 1e-5
    fixed = crosscheck(trl_cell(start, objective, updates=6, lr=0.02, **_without(training)), 6, "float64")
    assert abs(fixed[-1].loss_klab - differences[-1].loss_klab) > 1e-3


def _without(training: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in training.items() if name not in ("reference", "beta_control")}


@pytest.mark.parametrize("rule", [{"update_every": 4}, {"ema": 0.5}], ids=["reset", "trailing"])
def test_resumed_as_if_undisturbed(make_run: MakeRun, rule: dict[str, Any]) -> None:
    training = {
        "engine": "trl", "reference": rule, "updates": 8, "updates_per_rollout": 2, "checkpoint_updates": 1000,
        "beta_control": {"schedule": "linear"},
    }  # fmt: skip
    quiet, disturbed = (make_run(name, training, [{"beta": 0.5}]) for name in ("quiet", "disturbed"))
    (cell,) = quiet.cells
    assert train_cells(quiet.path, [cell]) == {cell: "finished"}
    assert train_cells(disturbed.path, [cell], stop=StopAfter(2)) == {cell: "interrupted"}
    assert list(disturbed.cell(cell).checkpoint.rglob("klab_reference.safetensors"))
    assert train_cells(disturbed.path, [cell]) == {cell: "finished"}
    assert numbers(quiet, cell) == numbers(disturbed, cell)
    rows = numbers(quiet, cell)["evaluations"]
    assert rows[0]["moving_kl"] == pytest.approx(0.0, abs=1e-6) == pytest.approx(rows[0]["reverse_kl"], abs=1e-6)
    assert rows[-1]["reverse_kl"] > 1e-4
    if "update_every" in rule:  # the last update is one after which the reference moves
        assert rows[-1]["moving_kl"] == pytest.approx(0.0, abs=1e-6)
    assert [row["beta"] for row in numbers(quiet, cell)["metrics"]][-1] == 0.0


def test_trl_moves_its_own_reference_model(start: Path, tmp_path: Path) -> None:
    cell = trl_cell(start, {}, reference={"ema": 0.4, "update_every": 3}, updates=8)
    try:
        trainer = trainer_of(cell, start, tmp_path)
        assert trainer.args.sync_ref_model
        assert trainer.args.ref_model_mixup_alpha == 0.6
        assert trainer.args.ref_model_sync_steps == 3
    finally:
        reset_accelerate()


@pytest.mark.parametrize(
    ("objective", "training", "message"),
    [
        ({}, {"trl": {"sync_ref_model": True}}, r"sync_ref_model.*training\.reference"),
        (
            {"estimator": "full"},
            {"reference": "rollout", "updates_per_rollout": 2},
            r"objective\.estimator.*keeps no copy",
        ),
    ],
)
def test_what_trl_cannot_do_is_refused(
    start: Path, objective: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        trl_cell(start, objective, **training)


def test_beside_adapters_the_reference_is_refused_where_it_is_read(make_run: MakeRun) -> None:
    training = {"engine": "trl", "reference": {"update_every": 2}}
    with pytest.raises(UserError, match=r"training\.reference.*beside adapters"):
        make_run("refused", training, policy={"lora": {"rank": 2}})
