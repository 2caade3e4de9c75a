"""Weights that processes share out train as those of one process do, in two and four real processes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from klab.grid.catalogue import AXES
from klab.harness.policy.hf import output_layer
from klab.harness.policy.hf import policy as transformers_policy
from klab.harness.policy.hf.sharded import ShardedPolicy
from klab.harness.policy.pretrained import read_config
from klab.harness.preflight.memory import estimate_memory, pretrained_sizes
from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.harness.training.distributed.gathering import gathered
from klab.harness.training.distributed.process_group import SINGLE_PROCESS
from klab.harness.training.pack import Pack
from klab.harness.training.packed_cell import PackedCell
from klab.tasks import load_task
from tests.support.gradients_of_cells import gradients
from tests.support.random_checkpoints import checkpoint
from tests.support.training_records import MakeRun, StopAfter, assert_close, assert_same, finished, weights
from tests.support.worker_pool import WorkerPool, worker_pool

PROCESSES = 4
EXACT = {"dtype": "float64"}
PLAIN = {"engine": "transformers", **EXACT}
SHARDED = {"sharding": "full", **PLAIN}
LORA = {"lora": {"rank": 3, "alpha": 6.0}}
QUICK = {"updates": 3, "evaluate_every": 1000, "evaluation_prompts": 3, "checkpoint_updates": 1000}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    with worker_pool(tmp_path_factory.mktemp("workers"), PROCESSES) as pool:
        yield pool


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of two layers whose embedding is also its output layer; 7 rows do not divide among 2 or 4 processes."""
    return checkpoint(tmp_path_factory.mktemp("start"), "Qwen2", "abcd", tie_word_embeddings=True)


@pytest.mark.parametrize(("lora", "size"), [({}, 4), (LORA, 2)], ids=["whole, 4 processes", "adapters, 2 processes"])
def test_the_gradient_of_one_process_for_every_placement_of_the_kl(
    make_run: MakeRun, together: WorkerPool, lora: dict[str, Any], size: int
) -> None:
    cells = [{"placement": placement, "beta": 0.5} for placement in AXES["placement"].values if placement != "none"]
    training = {"updates_per_rollout": 2, "prompts": 3, "group_size": 2, "micro_batch": 2}
    plain = {**PLAIN, "gradient_checkpointing": True, **lora}
    alone = gradients(make_run("alone", training, [{"placement": "none"}, *cells], policy=plain))
    several = make_run("several", training, [{"placement": "none"}, *cells], policy={**plain, "sharding": "full"})
    for cell, found in together.gradients(several, size).items():
        expected = alone[cell]
        assert expected.keys() == found.keys()
        largest = max(float(value.abs().max()) for value in expected.values())
        assert largest > 1e-4
        for name, value in expected.items():
            assert float((found[name] - value).abs().max()) < 1e-9 * max(1.0, largest), (cell, name)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "an odd number of micro-batches of single rows": (
        {"micro_batch": 1, "prompts": 3, "group_size": 1},
        {"advantage": "raw"},
    ),
    "fewer rows than processes": ({"prompts": 1, "group_size": 2, "evaluation_prompts": 1}, {}),
    "whole distributions": ({"micro_batch": 4}, {"estimator": "full", "placement": "loss"}),
    "the policy that drew the rollout": (
        {"reference": "rollout", "updates_per_rollout": 2, "micro_batch": 4},
        {"beta": 0.5},
    ),
    "another sampler, drawn again, greedy": (
        {"equal_groups": "refill", "sampler": {"temperature": 1.5, "dtype": "float32", "correction": "tis"}, "lag": 1},
        {"advantage": "greedy_baseline"},
    ),
}


@pytest.mark.parametrize(("training", "objective"), CASES.values(), ids=CASES.keys())
def test_the_numbers_of_one_process(
    make_run: MakeRun, together: WorkerPool, training: dict[str, Any], objective: dict[str, Any]
) -> None:
    policy = {"gradient_checkpointing": "micro_batch" in training}
    single = finished(make_run("single", {**QUICK, **training}, [objective], policy={**PLAIN, **policy}))
    several = make_run("several", {**QUICK, **training}, [objective], policy={**SHARDED, **policy})
    assert set(together(several, PROCESSES).values()) == {"finished"}
    assert_close(single, several, *((1e-3, 1e-4) if "sampler" in training else ()))  # a sampler of 32 bits


def test_each_process_holds_its_part_of_weights_gradients_and_moments(make_run: MakeRun, together: WorkerPool) -> None:
    """The files of a checkpoint are what each process had."""
    run = make_run("parts", {**QUICK, "updates": 2}, policy=SHARDED)
    assert set(together(run, 2, stop=StopAfter(1)).values()) == {"interrupted"}
    (folder,) = run.cell(run.cells[0]).checkpoint.glob("shards-*")
    own = [sum(map(torch.numel, load_file(file).values())) for file in sorted(folder.glob("*.safetensors"))]
    assert len(own) == 2
    model = sum(map(torch.numel, finished_weights(make_run, run).values()))
    assert sum(own) == 3 * model
    assert max(own) / sum(own) < 0.55


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_chunks_of_logits_have_the_gradient_of_whole_ones(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """The output layer's weights are used after the module's forward pass, and gathered still."""
    policy = {**SHARDED, "dtype": dtype, "gradient_checkpointing": True}
    found = []
    for name in ("whole", "chunks"):
        try:
            found.append(gradients(make_run(name, {"updates_per_rollout": 2, "micro_batch": 4}, policy=policy)))
        finally:
            torch.distributed.destroy_process_group()
        monkeypatch.setattr(transformers_policy, "max_logits", lambda _: 30)
        monkeypatch.setattr(output_layer, "max_logits", lambda _: 30)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == "float64" else {"rtol": 0.05, "atol": 0.02}
    for cell, whole in found[0].items():
        for name, value in whole.items():
            torch.testing.assert_close(found[1][cell][name], value, **tolerance)


@pytest.mark.parametrize("policy", [{}, LORA, {"dtype": "bfloat16"}, {**LORA, "dtype": "bfloat16"}])
def test_the_memory_that_plan_expects_is_what_a_process_holds(make_run: MakeRun, policy: dict[str, Any]) -> None:
    run = make_run("memory", policy={"sharding": "full", "dtype": "float32", **policy})
    cell = run.cell(run.cells[0]).cell()
    pack = Pack([PackedCell(cell, load_task(cell.task), Path(cell.policy.model))])  # type: ignore[union-attr]
    try:
        own, reference = pack.policy, pack.reference
        assert isinstance(own, ShardedPolicy)
        assert isinstance(reference, ShardedPolicy)
        moments = [*pack.optimizer.first.values(), *pack.optimizer.second.values()]
        with gathered(SINGLE_PROCESS, own, reference):
            whole = held([*own.trained.whole.values(), *own.frozen.whole.values(), *reference.trained.whole.values()])
    finally:
        torch.distributed.destroy_process_group()
    sizes = pretrained_sizes(cell.policy, read_config(cell.policy.model))  # type: ignore[union-attr]
    assert sizes is not None
    estimate = estimate_memory(cell, sizes)
    parts = estimate.of_each(1).parts()
    assert parts.pop("gathered weights") == whole
    assert parts.pop("gradients") == parts["weights"] == held(local(own.trained.shares.values()))
    assert parts["Adam moments"] == held(moments)
    assert parts.get("frozen base", 0) == held(local(own.frozen.shares.values()))
    assert parts.get("reference", 0) == held(local(reference.trained.shares.values()))
    of_four = estimate.of_each(4).parts()
    assert of_four["Adam moments"] == -(-parts["Adam moments"] // 4)
    assert of_four["gathered weights"] == whole


def local(shares: Iterable[Any]) -> list[torch.Tensor]:
    return [share.to_local() for share in shares]


def held(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def finished_weights(make_run: MakeRun, run: Run) -> dict[str, torch.Tensor]:
    """The weights of a cell after it was trained on in this process alone."""
    assert set(run_cells(run.path, run.cells).values()) == {"finished"}
    torch.distributed.destroy_process_group()
    return weights(run, run.cells[0])


@pytest.mark.parametrize("lora", [{}, LORA], ids=["whole", "adapters"])
def test_resumed_by_as_many_processes_to_the_bit_and_by_others_to_rounding(
    make_run: MakeRun, together: WorkerPool, lora: dict[str, Any]
) -> None:
    training, policy = {**QUICK, "updates": 6, "updates_per_rollout": 2}, {**SHARDED, **lora}
    through, broken, moved = (make_run(name, training, policy=policy) for name in ("through", "broken", "moved"))
    assert set(together(through, 2).values()) == {"finished"}
    for run, sizes in ((broken, (2, 2)), (moved, (3, 1) if lora else (4, 3))):
        for size in sizes:
            assert set(together(run, size, stop=StopAfter(2)).values()) == {"interrupted"}
        assert set(together(run, 2).values()) == {"finished"}
    assert_same(through, broken, through.cells[0])
    assert_close(through, moved)


def test_a_save_that_is_killed_leaves_the_checkpoint_before_it(make_run: MakeRun, together: WorkerPool) -> None:
    """Both before its folder is whole and before the cell's state says that it counts."""
    through, killed = (make_run(name, {**QUICK, "updates": 4}, policy=SHARDED) for name in ("through", "killed"))
    assert set(together(through, 2).values()) == {"finished"}
    assert set(together(killed, 2, stop=StopAfter(2)).values()) == {"interrupted"}
    folder = killed.cell(killed.cells[0]).checkpoint
    for name in ("shards-00000003", ".shards-00000004.partial"):
        (folder / name).mkdir()
        (folder / name / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half of i")
    assert set(together(killed, 2, stop=StopAfter(1)).values()) == {"interrupted"}
    assert sorted(path.name for path in folder.iterdir()) == ["shards-00000003", "state.safetensors"]
    assert set(together(killed, 2).values()) == {"finished"}
    assert_same(through, killed, through.cells[0])


@pytest.mark.faults
def test_damaged_shares_are_not_believed(
    make_run: MakeRun, together: WorkerPool, capfd: pytest.CaptureFixture[str]
) -> None:
    """A changed number fails the cell, which says what to do; a file that is cut short starts it again."""
    run = make_run("damaged", {**QUICK, "updates": 2}, policy=SHARDED)
    assert set(together(run, 2, stop=StopAfter(1)).values()) == {"interrupted"}
    (folder,) = run.cell(run.cells[0]).checkpoint.glob("shards-*")
    file = min(folder.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert set(together(run, 2).values()) == {"failed"}
    assert "is damaged: its checksum does not fit" in (run.cell(run.cells[0]).error() or "")
    file.write_bytes(whole[:-1])
    assert set(together(run, 2).values()) == {"finished"}
    assert "starts again from its beginning" in capfd.readouterr().err


@pytest.mark.parametrize("lora", [{}, LORA], ids=["whole", "adapters"])
def test_half_precision_computes_with_rounded_copies_of_float32_shares(
    make_run: MakeRun, together: WorkerPool, lora: dict[str, Any]
) -> None:
    """As one process does, up to sums in bfloat16: the same first rollout, and weights that have hardly moved apart."""
    training = {**QUICK, "updates": 2, "lr": 1e-4}
    single = finished(make_run("single", training, policy={**PLAIN, **lora, "dtype": "bfloat16"}))
    several = make_run("several", training, policy={**SHARDED, **lora, "dtype": "bfloat16"})
    assert set(together(several, 2).values()) == {"finished"}
    mine, theirs = weights(single, single.cells[0]), weights(several, several.cells[0])
    assert {value.dtype for value in theirs.values()} == {torch.float32 if lora else torch.bfloat16}
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0.02, atol=1e-3)


def test_the_trained_policy_is_an_ordinary_folder(make_run: MakeRun, together: WorkerPool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    whole = make_run("whole", {**QUICK, "updates": 1}, policy={**SHARDED, "offload": "cpu"})
    adapters = make_run("adapters", {**QUICK, "updates": 1}, policy={**SHARDED, **LORA})
    for run in (whole, adapters):
        assert set(together(run, 2).values()) == {"finished"}
    folder = whole.cell(whole.cells[0]).policy
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.dtype == torch.float64
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    base = AutoModelForCausalLM.from_pretrained(whole.resolved(whole.cells[0])["policy"]["model"], dtype=torch.float64)
    adapted = PeftModel.from_pretrained(base, adapters.cell(adapters.cells[0]).policy)
    tokens = torch.tensor([[3, 4, 5]])
    moved = adapted(tokens).logits
    with adapted.disable_adapter():
        assert not torch.equal(moved, adapted(tokens).logits)


def test_an_objective_that_raises_in_one_process_fails_its_cell_alone(make_run: MakeRun, together: WorkerPool) -> None:
    """In the backward pass's own loss: the whole minibatch has 16 rows, a process's part 8."""
    cells = [{"weight": {"name": "letters_task:picky", "process": 1}}, {}]
    run = make_run("broken", {**QUICK, "updates": 2}, cells, policy=SHARDED)
    broken, sound = run.cells
    assert together(run, 2) == {broken: "failed", sound: "finished"}
    assert "process 1 of 2" in (run.cell(broken).error() or "")
