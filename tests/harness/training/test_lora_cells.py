"""Cells that train adapters or 16-bit weights: the same bits alone, packed and resumed, and what they leave behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from klab.harness.policy.load import load_policy
from klab.harness.training import checkpoint, run_cells
from klab.harness.training.runner import prepare_cell
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, numbers, weights

pytestmark = pytest.mark.bits

POLICY: dict[str, Any] = {"lora": {"rank": 2, "alpha": 8.0, "targets": ["q_proj", "down_proj"]}}
NARROW: dict[str, Any] = {"dtype": "bfloat16"}
OBJECTIVES: list[dict[str, Any]] = [
    {"estimator": "k3", "placement": "loss"},
    {"estimator": "full", "placement": "loss"},
]


@pytest.mark.parametrize("policy", [POLICY, NARROW, {**POLICY, **NARROW}], ids=["adapters", "bfloat16", "both"])
def test_packed_is_alone(make_run: MakeRun, policy: dict[str, Any]) -> None:
    packed = finished(make_run("packed", objectives=OBJECTIVES, seeds=2, policy=policy))
    alone = make_run("alone", objectives=OBJECTIVES, seeds=2, policy=policy)
    for identity in alone.cells:
        run_cells(alone.path, [identity])
        assert_same(packed, alone, identity)


def test_16_bit_weights_interrupted_after_every_single_update(make_run: MakeRun) -> None:
    through, broken = (make_run(name, policy=NARROW, training={"lr": 1e-5}) for name in ("through", "broken"))
    finished(through)
    identity = broken.cells[0]
    for _ in range(5):
        assert run_cells(broken.path, [identity], stop=StopAfter(1)) == {identity: "interrupted"}
    assert run_cells(broken.path, [identity]) == {identity: "finished"}
    assert_same(through, broken, identity)
    assert {value.dtype for value in weights(through, identity).values()} == {torch.bfloat16}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_interrupted_after_every_single_update(make_run: MakeRun, checkpointing: bool) -> None:
    policy = {**POLICY, "gradient_checkpointing": checkpointing}
    through, broken = finished(make_run("through", policy=policy)), make_run("broken", policy=policy)
    identity = broken.cells[0]
    for _ in range(5):
        assert run_cells(broken.path, [identity], stop=StopAfter(1)) == {identity: "interrupted"}
    names = load_file(broken.cell(identity).checkpoint / checkpoint.FILE)
    assert {n.rsplit(".", 1)[1] for n in names if n.startswith("optimizer/weight/")} == {"A", "B"}
    assert run_cells(broken.path, [identity]) == {identity: "finished"}
    assert_same(through, broken, identity)


def test_gradient_checkpointing_changes_no_number(make_run: MakeRun) -> None:
    plain = finished(make_run("plain", policy=POLICY))
    saving = finished(make_run("saving", policy={**POLICY, "gradient_checkpointing": True}))
    mine, theirs = (numbers(run, run.cells[0]) for run in (plain, saving))
    assert mine["metrics"] == theirs["metrics"]
    assert mine["evaluations"] == theirs["evaluations"]


def test_the_reference_is_the_base_and_training_moves_away_from_it(make_run: MakeRun, start: Path) -> None:
    run = finished(make_run(policy=POLICY, training={"lr": 0.05}))
    folder = run.cell(run.cells[0])
    evaluations = folder.evaluations()
    assert evaluations[0]["reverse_kl"] == 0
    assert evaluations[-1]["reverse_kl"] > 0.001
    assert json.loads((folder.policy / "adapter_config.json").read_text())["base_model_name_or_path"] == str(start)
    assert set(weights(run, run.cells[0])) == {
        f"base_model.model.model.layers.0.{part}.lora_{end}.weight"
        for part in ("self_attn.q_proj", "mlp.down_proj")
        for end in "AB"
    }
    policy = load_policy(run.cell(run.cells[0]).cell().policy, start, 1, "cpu")
    policy.load(folder.policy, 0)
    assert all(torch.isfinite(value).all() and value.any() for value in policy.parameters.values())


@pytest.mark.parametrize("policy", [{}, POLICY], ids=["all weights", "adapters"])
def test_adapters_are_stacked_over_one_starting_policy_only(
    make_run: MakeRun, start: Path, tmp_path: Path, policy: dict[str, Any]
) -> None:
    run = make_run(policy=policy)
    member, _ = prepare_cell(run, run.cell(run.cells[0]))
    elsewhere = replace(member, start=Path(shutil.copytree(start, tmp_path / "copy")))
    assert (elsewhere.shape() == member.shape()) == (policy == {})
