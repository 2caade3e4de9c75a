"""The least memory of a cell: counted on the tensors that training holds, and compared with what was asked for."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from klab.grid import Cell, Grid, parse_grid
from klab.grid.schema.sections import ReferencePolicy, TinyPolicy
from klab.grid.user_code import python_command
from klab.harness.cli.main import main
from klab.harness.cli.memory import JobMemory
from klab.harness.policy.init.initial_policy import tiny_config
from klab.harness.policy.load import load_policy
from klab.harness.policy.pretrained import read_config
from klab.harness.policy.stacked.architecture import Architecture
from klab.harness.preflight.checks import check
from klab.harness.preflight.memory import (
    MemoryEstimate,
    estimate_memory,
    memory_keys,
    pretrained_sizes,
    stacked_sizes,
    tiny_architecture,
    tiny_sizes,
)
from klab.harness.store import machine
from klab.harness.training.optim.critic import Critics
from klab.harness.training.optim.moving_reference import MovingReference
from klab.harness.training.optim.optimizer import StackedAdamW
from tests.support.random_checkpoints import checkpoint
from tests.support.transformers_tokenizer import character_tokenizer

LORA = {"lora": {"rank": 3, "targets": ["q_proj", "down_proj"]}}
POLICIES: dict[str, dict[str, Any]] = {
    "whole": {},
    "float64": {"dtype": "float64"},
    "16-bit": {"dtype": "bfloat16"},
    "adapters": LORA,
    "16-bit adapters": {**LORA, "dtype": "bfloat16"},
    "transformers": {"engine": "transformers"},
    "transformers, 16-bit": {"engine": "transformers", "dtype": "bfloat16"},
    "transformers, 16-bit adapters": {**LORA, "engine": "transformers", "dtype": "bfloat16"},
}


def cell_of(policy: dict[str, Any], critic: dict[str, Any] | None = None) -> Cell:
    objective = {"advantage": "gae", "placement": "none"} if critic else {}
    grid = {"name": "mine", "task": {"name": "addition"}, "policy": policy, "objective": objective}
    return parse_grid(json.dumps({**grid, "training": {"critic": critic} if critic else {}}), "mine.yaml").cells[0]


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages behind these tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def optimized(optimizer: StackedAdamW) -> list[Tensor]:
    """All that an optimizer holds at the moment of a step of all its cells."""
    steps = [optimizer.prepare_step(c, slices, 1e-3, 1.0) for c, slices in enumerate(optimizer.gradients())]
    kept = [optimizer.parameters, optimizer.masters, optimizer.first, optimizer.second]
    gradients = [p.grad for p in optimizer.parameters.values() if p.grad is not None]
    used = [g for step in steps for g in (*step.gradients, step.buffer) if g is not None]
    return [*(v for group in kept for v in group.values()), *gradients, *used]


@pytest.mark.parametrize("cells", [1, 3])
@pytest.mark.parametrize("critic", [None, "head", "model"])
@pytest.mark.parametrize("name", POLICIES)
def test_it_is_what_training_holds_at_a_step(tmp_path: Path, name: str, critic: str | None, cells: int) -> None:
    start = checkpoint(tmp_path / "start", "Qwen2", "0123456789+=", tie_word_embeddings=True)
    cell = cell_of({"name": "hf", "model": str(start), **POLICIES[name]}, critic and {"kind": critic})
    policy: Any = load_policy(cell.policy, start, cells, "cpu")
    reference: Any = policy.frozen_copy()
    optimizer = StackedAdamW(policy.parameters, [cell.training] * cells)
    critics = Critics.of(
        cell.training.critic, [cell.training] * cells, policy, lambda: load_policy(cell.policy, start, cells, "cpu")
    )
    trained = [*optimized(optimizer), *policy.shared.values()]
    if critics is not None:
        trunk: Any = critics.trunk
        trained += optimized(critics.optimizer) + ([] if trunk is None else list(trunk.shared.values()))
    sizes = pretrained_sizes(cell.policy, read_config(start))
    assert sizes is not None
    parts = estimate_memory(cell, sizes).parts(cells)
    frozen = parts.pop("reference", 0)
    assert sum(parts.values()) == held(trained)
    everything = held([*trained, *reference.parameters.values(), *reference.shared.values()])
    assert frozen <= everything - held(trained)
    if cells == 1 or "transformers" not in name:  # that engine copies the reference for every cell
        assert frozen == everything - held(trained)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("rule", [{"update_every": 2}, {"ema": 0.9}], ids=["reset", "trailing"])
def test_a_moving_reference_is_counted_per_cell(tmp_path: Path, name: str, rule: dict[str, Any]) -> None:
    """As it is built: a copy of what is trained, with float32 means of 16-bit weights."""
    start = checkpoint(tmp_path / "start", "Qwen2", "0123456789+=", tie_word_embeddings=True)
    fixed = cell_of({"name": "hf", "model": str(start), **POLICIES[name]})
    moves = ReferencePolicy(**rule)
    cell = replace(fixed, training=fixed.training.model_copy(update={"reference": moves}))
    policy: Any = load_policy(cell.policy, start, 2, "cpu")
    moving = MovingReference(moves, policy, StackedAdamW(policy.parameters, [cell.training] * 2).masters)
    copies: Any = moving.policy
    sizes = pretrained_sizes(cell.policy, read_config(start))
    assert sizes is not None
    estimated = estimate_memory(cell, sizes).parts(2)["moving reference"]
    assert estimated == held([*copies.parameters.values(), *moving.weights.values()])
    assert "moving reference" not in estimate_memory(fixed, sizes).parts(2)
    assert memory_keys([cell]) != memory_keys([fixed])


@pytest.mark.parametrize("family", ["Gemma", "GPT2", "Mamba"])
def test_models_of_other_architectures_are_counted_without_memory(tmp_path: Path, family: str) -> None:
    start = checkpoint(tmp_path, family, "0123456789+=")
    cell = cell_of({"name": "hf", "model": str(start)})
    policy = load_policy(cell.policy, start, 1, "cpu")
    sizes = pretrained_sizes(cell.policy, read_config(start))
    assert sizes is not None
    assert sizes.trained == sizes.parameters == sum(value.numel() for value in policy.parameters.values())
    assert sizes.hidden_size == policy.hidden_size


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_a_tiny_policy_is_counted_as_it_is_built(family: Any, kv_heads: int | None) -> None:
    section = TinyPolicy(family=family, kv_heads=kv_heads)
    tokenizer = character_tokenizer("0123456789+=")
    built = Architecture.from_config(tiny_config(section, len(tokenizer), 1, 0, 256))
    assert built == tiny_architecture(section, len(tokenizer))
    assert tiny_sizes(section, "0123456789+=") == stacked_sizes(section, built)


def test_half_a_billion_parameters() -> None:
    """Qwen2.5-0.5B: 0.494 billion parameters; at a step 18 bytes for each in 16 bits (4 more of the embedding), 20 in
    float32."""
    qwen = Architecture(
        **{"family": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_layers": 24, "num_heads": 14},
        **{"num_kv_heads": 2, "head_dim": 64, "intermediate_size": 4864, "norm_eps": 1e-6, "initializer_range": 0.02},
        **{"qkv_bias": True, "out_bias": False, "mlp_bias": False, "qk_norm": False, "tied": True},
        context_length=32768,
    )  # type: ignore[arg-type]
    embedding = 151_936 * 896
    for dtype, each, more in (("bfloat16", 18, 4 * embedding), ("float32", 20, 0), ("float64", 40, 0)):
        cell = cell_of({"name": "hf", "model": "some/model", "dtype": dtype})
        estimate = estimate_memory(cell, stacked_sizes(cell.policy, qwen))
        assert estimate.parameters == 494_032_768
        assert estimate.total() == each * estimate.parameters + more


def test_cells_of_one_shape_have_one_key(make_grid: Callable[..., Grid]) -> None:
    values = [{"beta": 0.1}, {"beta": 0.2}]
    cells = make_grid(cells=values, seeds=2).cells
    gae = {"advantage": "gae", "placement": "none"}
    others = make_grid(cells=[gae], critic={"kind": "head"}).cells
    assert len(set(memory_keys(cells))) == 1
    assert len(set(memory_keys([*cells, *others]))) == 2


@pytest.mark.parametrize(("engine", "expected"), [("klab", 1), ("trl", 0)])
def test_what_trl_needs_is_not_told(tmp_path: Path, engine: str, expected: int) -> None:
    start = checkpoint(tmp_path / "start", "Qwen2", "0123456789+=")
    policy = {"name": "hf", "model": str(start)}
    grid = {"name": "mine", "task": {"name": "addition"}, "policy": policy, "training": {"engine": engine}}
    cells = parse_grid(json.dumps(grid), "mine.yaml").cells
    found = [each for each in check(cells, tmp_path / "mine.yaml") if isinstance(each, MemoryEstimate)]
    assert len(found) == expected


def test_a_tiny_policy_is_checked_without_torch(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ntask: addition\npolicy: tiny\n")
    code = """
import sys
from pathlib import Path
from klab.grid import load_grid
from klab.harness.preflight.checks import check
found = list(check(load_grid("mine.yaml").cells[:1], Path("mine.yaml")))
print(sum(found[0].per_cell.values()), "torch" in sys.modules)
"""
    done = subprocess.run(python_command("-c", code), cwd=tmp_path, capture_output=True, text=True, check=True)
    size, loaded = done.stdout.split()
    assert 1e5 < int(size) < 1e7
    assert loaded == "False"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def needed(capsys: pytest.CaptureFixture[str]) -> int:
    code, out, _ = run(capsys, "plan", "little.yaml", "--json")
    assert code == 0
    (need,) = json.loads(out)["memory"]
    assert need["bytes"] == sum(need["parts"].values())
    return int(need["bytes"])


@pytest.mark.faults
def test_asking_for_less_is_one_line(
    make_grid: Callable[..., Grid], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_grid(cells=[{"beta": 0.1}, {"beta": 0.2}], seeds=2)
    limit = 0.9 * needed(capsys) / 2**30
    make_grid(cells=[{"beta": 0.1}, {"beta": 0.2}], seeds=2, resources={"memory_gb": limit})
    for words in (["plan"], ["launch", "--dry-run"], ["launch"], ["launch", "--on", "here"]):
        code, _, err = run(capsys, words[0], "little.yaml", *words[1:])
        assert code == 2
        (line,) = err.splitlines()
        assert line.startswith("klab: ")
        assert "little.yaml: resources.memory_gb: training needs at least" in line
        assert f"(got {limit!r})" in line
        assert "policy.lora" in line
    assert not (place / "runs").exists()
    assert run(capsys, "plan", "little.yaml", "--no-check")[0] == 0
    assert run(capsys, "launch", "little.yaml", "--dry-run", "--memory-gb", "1")[0] == 0


@pytest.mark.faults
def test_cells_trained_together_and_processes_need_more(
    make_grid: Callable[..., Grid], capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [{"beta": 0.1}, {"beta": 0.2}]
    make_grid(cells=cells, seeds=2)
    one = needed(capsys)
    limit = {"memory_gb": 1.5 * one / 2**30}
    make_grid(cells=cells, seeds=2, resources={**limit, "cells_per_job": 9})
    code, _, err = run(capsys, "plan", "little.yaml")
    assert code == 2
    assert "for 4 cells at once" in err
    assert "resources.cells_per_job: 1" in err
    make_grid(cells=cells, seeds=2, resources=limit)
    assert run(capsys, "plan", "little.yaml")[0] == 0
    assert run(capsys, "launch", "little.yaml", "--dry-run", "--cells-per-job", "2")[0] == 2
    code, _, err = run(capsys, "launch", "little.yaml", "--dry-run", "--processes", "2")
    assert code == 2
    assert "in 2 processes" in err
    assert "resources.processes: 1" in err


def test_tiny_policies_fit_by_default(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine.yaml").write_text("name: mine\ntask: addition\npolicy: tiny\n")
    code, out, _ = run(capsys, "plan", "mine.yaml")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("memory: ")]
    assert line.startswith("memory: at least 2.")
    assert f" MB of the {machine.memory_gb():.3g} GB per node for a cell of a tiny policy with " in line
    assert "Adam moments" in line


def test_of_gpus_elsewhere_it_is_stated(make_grid: Callable[..., Grid], capsys: pytest.CaptureFixture[str]) -> None:
    make_grid(resources={"gpus": "a100:2", "memory_gb": 1e-6})
    code, out, _ = run(capsys, "plan", "little.yaml")
    assert code == 0
    assert "MB per GPU for a cell of " in out
    _, out, _ = run(capsys, "plan", "little.yaml", "--json")
    (need,) = json.loads(out)["memory"]
    assert (need["per"], need["processes"], need["cells"]) == ("gpu", 1, 1)


@pytest.mark.parametrize(("mebibytes", "code"), [("0\n0\n", 2), ("0\n81559\n", 0), ("[N/A]\n", 0)])
def test_of_gpus_of_this_machine_the_driver_tells_the_memory(
    make_grid: Callable[..., Grid],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mebibytes: str,
    code: int,
) -> None:
    driver = place / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text(f"#!/bin/sh\nprintf '{mebibytes}'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(driver.parent), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    make_grid(resources={"memory_gb": 1e-6})
    found, _, err = run(capsys, "launch", "little.yaml", "--dry-run")
    assert found == code
    assert ("the largest GPU here has 0 GB" in err) == (code == 2)
    code, _, err = run(capsys, "launch", "little.yaml", "--dry-run", "--device", "cpu")
    assert code == 2
    assert "resources.memory_gb" in err


@pytest.mark.faults
def test_slurm_s_own_options_for_memory_are_taken_at_their_word(
    make_grid: Callable[..., Grid], capsys: pytest.CaptureFixture[str]
) -> None:
    make_grid(resources={"memory_gb": 1e-6})
    slurm = ["launch", "little.yaml", "--on", "slurm", "--dry-run"]
    assert run(capsys, *slurm)[0] == 2
    assert run(capsys, *slurm, "--memory-gb", "1")[0] == 0
    assert run(capsys, *slurm, "--sbatch", "mem-per-cpu=1G")[0] == 0
    assert run(capsys, *slurm, "--gpus", "1")[0] == 0


def test_adapters_that_a_model_cannot_have_are_found(
    place: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = {"name": "hf", "model": str(digits), "lora": {"targets": ["q_prj"]}}
    task = {"name": "addition", "digits": 1}
    (place / "mine.yaml").write_text(json.dumps({"name": "mine", "task": task, "policy": policy}))
    code, _, err = run(capsys, "plan", "mine.yaml")
    assert code == 2
    assert "policy.lora.targets: no such linear layer (got 'q_prj'); did you mean 'q_proj'" in err


def test_what_was_not_asked_for_is_this_machines_memory() -> None:
    grid = "name: n\ntask: {name: addition}\nresources: {%s}\n"
    default, asked = (parse_grid(grid % text, "n.yaml").resources for text in ("cpus: 2", "memory_gb: 3"))
    for job in (JobMemory.here, JobMemory.planned):
        assert job(default, None, "cpu").limit_gb == machine.memory_gb()
        assert job(asked, None, "cpu").limit_gb == 3
    assert JobMemory.on_slurm(default, None).limit_gb == default.memory_gb
