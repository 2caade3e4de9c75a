"""A cell on TRL leaves what every cell leaves, is stopped and resumed like every cell, and fails alone."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from klab.grid import UserError
from klab.grid.engines import SET_BY_KLAB
from klab.grid.schema.training import TrainingSection, TrlConfig
from klab.harness.dispatch.job import run_job
from klab.harness.engines.trl.run import train_cells
from klab.harness.engines.trl.settings import check_fields
from klab.harness.store import Run
from klab.harness.training import run_cells
from tests.support.training_records import MakeRun, StopAfter, numbers, weights

TRL = {"engine": "trl"}

PASSED_THROUGH = {
    *("optim", "optim_args", "optim_target_modules"),
    *("tf32", "use_cache", "cache_implementation", "cast_lm_head_to_fp32", "full_determinism", "model_init_kwargs"),
    *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "torch_empty_cache_steps"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config"),
    *("log_level", "log_level_replica", "disable_tqdm", "debug", "skip_memory_metrics", "local_rank"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_in_order"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("accelerator_config", "parallelism_config", "fsdp", "fsdp_config", "deepspeed", "ds3_gather_for_generation"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend"),
    *("top_k", "min_p", "repetition_penalty", "generation_kwargs"),
    *("vllm_model_impl", "vllm_structured_outputs_regex", "vllm_server_timeout", "vllm_max_model_length"),
    *("vllm_tensor_parallel_size", "use_transformers_paged"),
    *("use_transformers_continuous_batching", "transformers_continuous_batching_config"),
}
"""Fields of `GRPOConfig` that a grid file may set."""


def finished(run: Run) -> Run:
    """The run after an undisturbed life of all of its cells."""
    assert set(train_cells(run.path, run.cells).values()) == {"finished"}, run.cell(run.cells[0]).error()
    return run


def assert_close(left: Run, right: Run, identity: str, rel: float = 0.0) -> None:
    """Equal records and weights of one cell in two runs, up to rounding."""
    mine, theirs = numbers(left, identity), numbers(right, identity)
    assert json.dumps(mine, sort_keys=True) == json.dumps(theirs, sort_keys=True)
    for name, value in weights(left, identity).items():
        torch.testing.assert_close(value, weights(right, identity)[name], rtol=rel, atol=rel)


def test_a_cell_leaves_what_a_cell_of_klabs_engine_leaves(make_run: MakeRun) -> None:
    ours = make_run("klab")
    run_cells(ours.path, ours.cells)
    theirs = finished(make_run("trl", TRL))
    mine, other = ours.cell(ours.cells[0]), theirs.cell(theirs.cells[0])
    assert [list(row) for row in other.metrics()] == [list(row) for row in mine.metrics()]
    assert [list(row) for row in other.evaluations()] == [list(row) for row in mine.evaluations()]
    assert (mine.result() or {}).keys() == (other.result() or {}).keys()
    recorded = [(folder.result() or {})["versions"] for folder in (mine, other)]
    assert recorded[1] == {**recorded[0], "trl": version("trl"), "accelerate": version("accelerate")}
    assert (ours.manifest["versions"], theirs.manifest["versions"]) == tuple(recorded)
    first, same = other.evaluations()[0], mine.evaluations()[0]
    assert first["samples"] == same["samples"]
    for name in ("accuracy", "reward", "pass_at_k", "reverse_kl", "forward_kl", "entropy", "length"):
        assert first[name] == pytest.approx(same[name], rel=1e-5, abs=1e-6), name
    assert not other.checkpoint.exists()
    assert {file.name for file in mine.policy.iterdir()} == {file.name for file in other.policy.iterdir()}
    assert isinstance(AutoModelForCausalLM.from_pretrained(other.policy), torch.nn.Module)


def test_the_reward_rises(make_run: MakeRun) -> None:
    training = {"updates": 50, "prompts": 8, "evaluate_every": 50, "checkpoint_updates": 999}
    run = finished(make_run(training={**TRL, **training}, objectives=[{"placement": "none"}]))
    rows = run.cell(run.cells[0]).metrics()
    assert rows[0]["reward_mean"] < 0.2
    assert (run.cell(run.cells[0]).result() or {})["reward_final"] > 0.35


@pytest.mark.parametrize("training", [{"updates_per_rollout": 2}, {"updates_per_rollout": 2, "minibatches": 2}])
def test_resumed_as_if_undisturbed(make_run: MakeRun, training: dict[str, Any]) -> None:
    settings = {**TRL, **training, "updates": 12, "micro_batch": 4, "checkpoint_updates": 1000}
    control = {"beta_control": {"target": 0.01}} | {"trust_region": {"target": 0.001}}
    quiet = finished(make_run("quiet", {**settings, **control}))
    disturbed = make_run("disturbed", {**settings, **control})
    (cell,) = disturbed.cells
    assert train_cells(disturbed.path, [cell], stop=StopAfter(2)) == {cell: "interrupted"}
    saved = disturbed.cell(cell).checkpoint
    steps = 2 * training.get("minibatches", 1)
    assert [path.name for path in saved.iterdir()] == [f"checkpoint-{2 * steps}"]
    assert not list(saved.rglob("training_args.bin"))
    disturbed.cell(cell).append_metrics([{**disturbed.cell(cell).metrics()[-1], "update": 2 * steps + 1}])
    assert train_cells(disturbed.path, [cell]) == {cell: "finished"}
    assert_close(quiet, disturbed, cell)


def test_a_checkpoint_that_is_not_whole_is_left_out(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(training={**TRL, "checkpoint_updates": 1})
    (cell,) = run.cells
    assert train_cells(run.path, [cell], stop=StopAfter(2)) == {cell: "interrupted"}
    (path,) = run.cell(cell).checkpoint.iterdir()
    (path / "model.safetensors").write_bytes(b"torn")
    assert train_cells(run.path, [cell]) == {cell: "finished"}
    assert "is not whole and is left out" in capsys.readouterr().err
    assert [row["update"] for row in run.cell(cell).metrics()] == [1, 2, 3, 4, 5, 6]


def test_failures_are_recorded_and_stay_with_their_cell(make_run: MakeRun) -> None:
    run = make_run(training=TRL, objectives=[{"weight": "letters_task:broken"}, {"placement": "none"}])
    broken, sound = run.cells
    states = run_job(run.path, tuple(run.cells), executor="here")
    assert states == {broken: "failed", sound: "finished"}
    assert run.cell(broken).attempts()[0]["versions"] == run.manifest["versions"]
    assert "the weight is broken" in (run.cell(broken).error() or "")


def test_a_reward_that_raises_fails_its_cell(make_run: MakeRun) -> None:
    run = make_run(training=TRL, task={"fail_at": "a"})
    assert set(train_cells(run.path, run.cells).values()) == {"failed"}
    assert "the reward of task 'letters' raised RuntimeError" in (run.cell(run.cells[0]).error() or "")


def test_a_cell_that_diverges_is_a_result(make_run: MakeRun) -> None:
    run = make_run(training={**TRL, "updates": 20}, task={"reward": "nan"})
    assert set(train_cells(run.path, run.cells).values()) == {"diverged"}
    folder = run.cell(run.cells[0])
    result = folder.result() or {}
    assert (result["updates"], result["nonfinite_updates"]) == (10, 10)
    assert result["reason"] == "rewards are not finite (NaN or infinite), 10 updates in a row"
    (start,) = Path(run.resolved(folder.id)["policy"]["model"]).glob("*.safetensors")
    for name, value in load_file(start).items():
        assert torch.equal(value, weights(run, folder.id)[name]), name


def test_a_hopeless_cell_stops_after_the_evaluation_that_shows_it(make_run: MakeRun) -> None:
    training = {**TRL, "updates": 6, "evaluate_every": 2}
    stopped = make_run("stopped", {**training, "stop": {"after": 3, "unless": {"reward": 2.0}}})
    (identity,) = stopped.cells
    assert train_cells(stopped.path, [identity], stop=StopAfter(3)) == {identity: "interrupted"}
    assert train_cells(stopped.path, [identity]) == {identity: "stopped"}
    through = finished(make_run("through", training))
    found, whole = numbers(stopped, identity), numbers(through, through.cells[0])
    assert found["metrics"] == whole["metrics"][:4]
    assert found["evaluations"] == whole["evaluations"][:3]
    assert (found["result"]["state"], found["result"]["updates"]) == ("stopped", 4)
    assert "at update 4 is below 2 (training.stop)" in found["result"]["reason"]
    assert not stopped.cell(identity).checkpoint.exists()


def test_out_of_memory_halves_the_micro_batch_once(make_run: MakeRun) -> None:
    objectives = [{"weight": f"letters_task:{name}", "placement": "none"} for name in ("hungry", "starving")]
    training = {**TRL, "micro_batch": 8, "updates_per_rollout": 2, "updates": 2, "evaluate_every": 2}
    run = make_run(training=training, objectives=objectives)
    assert list(train_cells(run.path, run.cells).values()) == ["finished", "failed"]
    assert "memory does not suffice" in (run.cell(run.cells[1]).error() or "")


def test_groups_are_dropped_and_truncated_trajectories_masked(make_run: MakeRun) -> None:
    training = {**TRL, "equal_groups": "drop", "truncated": "mask", "overlong_buffer": 2, "lr": 0.1, "micro_batch": 3}
    run = finished(make_run(training=training))
    rows = run.cell(run.cells[0]).metrics()
    assert {"kept_groups", "loss_tokens", "overlong"} <= rows[0].keys()
    assert any(row["kept_groups"] < 4 for row in rows)
    assert all(row["loss_tokens"] <= row["tokens"] for row in rows)


def test_an_environment_answers(make_run: MakeRun) -> None:
    run = finished(make_run(training={**TRL, "temperature": 2.0}, task={"name": "letters_task:Echo"}))
    rows = run.cell(run.cells[0]).metrics()
    assert all(row["length_mean"] <= 6 for row in rows)


def test_limits_of_time_are_counted(make_run: MakeRun) -> None:
    run = finished(make_run(training=TRL, task={"name": "letters_task:Overdue"}))
    folder = run.cell(run.cells[0])
    counted = [row["reward_timeouts"] for row in (*folder.metrics(), *folder.evaluations())]
    assert sum(counted) == (folder.result() or {})["reward_timeouts"] > 0


def test_unknown_fields_and_those_that_klab_sets() -> None:
    check_fields(TrainingSection(engine="trl", trl=TrlConfig(optim="sgd")))
    with pytest.raises(UserError, match=r"GRPOConfig has no such field \(got 'optimm'\); did you mean 'optim'"):
        check_fields(TrainingSection(engine="trl", trl=TrlConfig(optimm="sgd")))


def test_every_field_of_trls_configuration_is_known() -> None:
    """A field that TRL or transformers add is looked at before it is passed through: it may do nothing here, or undo
    what klab sets."""
    from trl import GRPOConfig

    gone = {"warmup_ratio", "logging_dir"}
    assert SET_BY_KLAB.keys() - gone | PASSED_THROUGH == GRPOConfig.__dataclass_fields__.keys()
    assert not SET_BY_KLAB.keys() & PASSED_THROUGH
