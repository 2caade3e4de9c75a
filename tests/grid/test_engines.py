"""What `training.engine: trl` refuses, and that cells of klab's own engine know nothing of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from klab.grid import Cell, Grid, UserError, parse_grid
from klab.grid.engines import engine_notes, rows_per_pass
from klab.grid.schema.sections import TrainingSection


def grid_of(training: dict[str, Any] | None = None, **sections: Any) -> Grid:
    written = {"name": "study", "task": "addition", "training": training or {}, **sections}
    return parse_grid(json.dumps(written), "study.yaml")


def refusal(training: dict[str, Any] | None = None, **sections: Any) -> str:
    with pytest.raises(UserError) as caught:
        grid_of({"engine": "trl", **(training or {})}, **sections)
    return str(caught.value)


def test_the_default_engine_is_no_part_of_an_id() -> None:
    plain, written = (grid_of(training).cells[0] for training in ({}, {"engine": "klab"}))
    assert plain.id == written.id == "k3-loss-group_norm-s0-26b6f972"
    assert not {"engine", "trl"} & plain.resolved()["training"].keys()


def test_engines_are_different_cells_that_survive_the_manifest() -> None:
    grid = grid_of(axes={"training.engine": ["klab", "trl"]})
    klab, trl = grid.cells
    assert klab.id == grid_of().cells[0].id != trl.id
    resolved = json.loads(json.dumps(trl.resolved()))
    assert Cell.from_resolved(resolved).training.engine == "trl"


def test_further_fields_are_part_of_the_identity_of_trls_cells_only() -> None:
    grid = grid_of({"trl": {"optim": "adamw_torch"}}, axes={"training.engine": ["klab", "trl"]})
    klab, trl = grid.cells
    assert klab.id == grid_of().cells[0].id
    assert trl.training.trl is not None
    assert trl.training.trl.fields == {"optim": "adamw_torch"}
    assert trl.id != grid_of({"engine": "trl"}).cells[0].id
    assert grid_of({"engine": "trl", "trl": {}}).cells[0].id == grid_of({"engine": "trl"}).cells[0].id
    assert Cell.from_resolved(trl.resolved()) == trl


def test_a_field_is_an_axis() -> None:
    grid = grid_of({"engine": "trl"}, axes={"training.trl.optim": ["adamw_torch", "sgd"]})
    assert [cell.training.trl.fields["optim"] for cell in grid.cells if cell.training.trl] == ["adamw_torch", "sgd"]


def test_further_fields_without_a_cell_of_trl_are_refused() -> None:
    with pytest.raises(UserError, match=r"training\.trl: has no effect in any cell"):
        grid_of({"trl": {"optim": "sgd"}})


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lag": 2}, r"training.lag: not with training.engine: trl"),
        ({"behaviour": "reference"}, "training.behaviour: not with training.engine: trl"),
        ({"token_budget": 100}, "training.token_budget: not with training.engine: trl"),
        ({"equal_groups": "refill"}, "training.equal_groups: not with training.engine: trl"),
        ({"equal_groups": "drop", "minibatches": 2}, "training.minibatches: not with training.engine: trl"),
        ({"sampler": {"dtype": "bfloat16"}}, "training.sampler.engine: not with training.engine: trl"),
        ({"sampler": {"engine": "vllm", "temperature": 0.9}}, "training.sampler.temperature: not with"),
        ({"sampler": {"engine": "vllm", "dtype": "float16"}}, "training.sampler.dtype: not with"),
        ({"sampler": {"engine": "klab"}}, "training.sampler.engine: not with"),
        (
            {"trl": {"learning_rate": 1e-5}},
            "training.trl.learning_rate: klab sets this field itself (got 1e-05) It",
        ),
        ({"trl": {"beta": 0.1}}, "It follows from the objective"),
        ({"trl": {"ddp_timeout": 60}}, "It follows from resources.collective_minutes"),
        ({"trl": {"model_init_kwargs": {"dtype": "bfloat16"}}}, "It follows from policy.dtype"),
        ({"trl": {"vllm_mode": "server"}}, "It follows from training.sampler.url"),
    ],
)
def test_what_trl_has_no_place_for_is_refused_by_name(training: dict[str, Any], message: str) -> None:
    found = refusal(training)
    assert found.startswith("study.yaml: ")
    assert message in found


def test_objectives_that_trl_cannot_train_are_refused() -> None:
    assert "GRPOTrainer has no critic" in refusal(objective={"algorithm": "ppo_rlhf"})
    assert "at least 2 completions" in refusal({"group_size": 1}, objective={"advantage": "raw"})
    greedy = {"advantage": "greedy_baseline"}
    assert "greedy completions of 'greedy_baseline'" in refusal({"sampler": {"engine": "vllm"}}, objective=greedy)
    assert grid_of({"engine": "trl"}, objective=greedy).cells


def test_another_engine_for_models_is_refused() -> None:
    policy = {"name": "hf", "model": "a", "engine": "stacked"}
    assert "policy.engine: is klab's own engine" in refusal(policy=policy, task="gsm8k")


@pytest.mark.parametrize(
    ("settings", "processes", "halved", "expected"),
    [
        ({"prompts": 4, "group_size": 3}, 1, False, (12, 1)),
        ({"prompts": 4, "group_size": 3, "micro_batch": 5}, 1, False, (4, 3)),
        ({"prompts": 4, "group_size": 3, "micro_batch": 5}, 2, False, (3, 2)),
        ({"prompts": 4, "group_size": 3, "minibatches": 2}, 3, False, (2, 1)),
        ({"prompts": 4, "group_size": 3}, 1, True, (6, 2)),
        ({"prompts": 1, "group_size": 3, "micro_batch": 1}, 1, True, (1, 3)),
    ],
)
def test_micro_batches_are_at_most_as_large_as_asked_for_and_equal(
    settings: dict[str, int], processes: int, halved: bool, expected: tuple[int, int]
) -> None:
    assert rows_per_pass(TrainingSection(**settings), processes, halved) == expected


def test_trajectories_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(UserError, match="the 12 trajectories of an update cannot be shared equally by 8 processes"):
        rows_per_pass(TrainingSection(prompts=4, group_size=3), 8)
    shares = {"prompts": 4, "group_size": 3}
    resources = {"nodes": 2, "gpus": 4, "launcher": "torchrun"}
    assert "cannot be shared equally by 8 processes" in refusal(shares, resources=resources)
    assert grid_of({"engine": "trl", **shares}, resources={**resources, "gpus": 3}).cells
    assert grid_of(shares, resources={"gpus": 8}).cells


def test_what_trl_does_otherwise_is_said() -> None:
    assert not list(engine_notes(TrainingSection(minibatches=2)))
    (note,) = engine_notes(TrainingSection(engine="trl", minibatches=2))
    assert note.startswith("training.minibatches: 2 with engine: trl: each is a random part of the rollout's traj")
    fields = {"top_k": 20, "optim": "sgd", "repetition_penalty": 1.1}
    (note,) = engine_notes(TrainingSection.model_validate({"engine": "trl", "trl": fields}))
    assert note.startswith("training.trl: top_k, repetition_penalty may let completions be drawn from another")


def test_a_launcher_starts_cells_of_trl_only(tmp_path: Any) -> None:
    (tmp_path / "fsdp.yaml").write_text("distributed_type: FSDP\n")
    written = {"name": "study", "task": "addition", "training": {"engine": "trl"}}
    launched = {**written, "resources": {"launcher": {"accelerate": "fsdp.yaml"}}}
    grid = parse_grid(json.dumps(launched), tmp_path / "study.yaml")
    assert grid.resources.launcher is not None
    assert grid.resources.launcher.accelerate == str(tmp_path / "fsdp.yaml")
    plain = parse_grid(json.dumps({**written, "resources": {"launcher": "torchrun"}}), "study.yaml").resources
    assert plain.launcher is not None
    assert plain.launcher.accelerate is None
    (tmp_path / "one.yaml").write_text("use_cpu: true\ndistributed_type: MULTI_CPU\n")
    (tmp_path / "list.yaml").write_text("- FSDP\n")
    one = {"accelerate": "one.yaml"}
    assert parse_grid(json.dumps({**written, "resources": {"launcher": one}}), tmp_path / "study.yaml").cells
    for resources, training, message in (
        ({"launcher": one, "processes": 2}, {"engine": "trl"}, "accelerate starts one process with this distributed_t"),
        ({"launcher": {"accelerate": "list.yaml"}}, {"engine": "trl"}, r"list.yaml: .*not a configuration of accel"),
        ({"launcher": "mpirun"}, {"engine": "trl"}, "resources.launcher: unknown launcher"),
        ({"launcher": {"accelerate": "gone.yaml"}}, {"engine": "trl"}, "no such file"),
        ({"launcher": "torchrun"}, {}, "starts cells of training.engine: trl only"),
    ):
        with pytest.raises(UserError, match=message):
            parse_grid(json.dumps({**written, "training": training, "resources": resources}), tmp_path / "study.yaml")


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MULTI_GPU"])
def test_a_reference_moves_where_each_process_has_the_whole_model(tmp_path: Any, kind: str) -> None:
    (tmp_path / "kind.yaml").write_text(f"distributed_type: {kind}\n")
    resources = {"gpus": 2, "launcher": {"accelerate": "kind.yaml"}}

    def cells(rule: Any) -> Any:
        training = {"engine": "trl", "updates_per_rollout": 2, "reference": rule}
        policy = {"name": "hf", "model": "some/model"}
        written = {"name": "n", "task": "addition", "policy": policy, "training": training, "resources": resources}
        return parse_grid(json.dumps(written), tmp_path / "study.yaml").cells

    assert cells("rollout")
    if kind == "MULTI_GPU":
        assert cells({"ema": 0.9})
    else:
        with pytest.raises(UserError, match=rf"training\.reference: with training\.engine: trl .* not with {kind}"):
            cells({"ema": 0.9})
