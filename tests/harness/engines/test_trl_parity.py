"""On TRL: its own losses over several steps, groups in two processes, a kill, real architectures, both engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from klab.harness.cli.main import main
from klab.harness.engines.trl.cell import make_trainer, prompt_dataset, reset_accelerate
from klab.harness.engines.trl.recorder import take_or_leave_step
from klab.harness.engines.trl.rollout_trainer import EXAMPLE
from klab.harness.engines.trl.run import train_cells
from klab.harness.engines.trl.settings import grpo_arguments
from klab.harness.policy.pretrained import read_tokenizer
from klab.harness.training import run_cells
from klab.harness.training.packed_cell import PackedCell
from klab.tasks import load_task
from tests.support.random_checkpoints import checkpoint
from tests.support.small_cells import LETTERS, small_policy
from tests.support.training_records import MakeRun, numbers, weights
from tests.support.trl_cells import rank_environment, trl_cell

pytestmark = pytest.mark.parity
ROOT = Path(__file__).parents[3]
GROUP_NORM = {"name": "group_norm", "std": "sample", "eps": 1e-4}
NAMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "GRPO": (
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
        {"placement": {"name": "loss", "beta": 0.3}, "advantage": GROUP_NORM},
    ),
    "GRPO, rho k3": (
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True},
        {"placement": {"name": "loss_corrected", "beta": 0.3}, "advantage": GROUP_NORM},
    ),
    "Dr. GRPO": (
        {"loss_type": "dr_grpo", "beta": 0.0, "scale_rewards": "none"},
        {"placement": "none", "advantage": "group_center", "aggregation": "constant"},
    ),
    "DAPO": (
        {"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.28},
        {"placement": "none", "advantage": GROUP_NORM, "aggregation": "token_mean", "eps_high": 0.28},
    ),
    "CISPO": (
        {"loss_type": "cispo", "beta": 0.0, "epsilon_high": 1.3},
        {
            "placement": "none",
            "advantage": GROUP_NORM,
            "aggregation": "token_mean",
            "weight": {"name": "truncate", "cap": 1.3},
        },
    ),
    "GSPO": (
        {
            "loss_type": "grpo",
            "beta": 0.0,
            "importance_sampling_level": "sequence",
            "epsilon": 3e-3,
            "epsilon_high": 4e-3,
        },
        {
            "placement": "none",
            "advantage": GROUP_NORM,
            "ratio": "sequence_mean",
            "path": "ratio",
            "eps_low": 3e-3,
            "eps_high": 4e-3,
        },
    ),
    "SAPO": (
        {"loss_type": "sapo", "beta": 0.0},
        {"placement": "none", "advantage": GROUP_NORM, "weight": "sigmoid"},
    ),
    "INTELLECT-2": (
        {"loss_type": "grpo", "beta": 0.0, "delta": 1.05, "epsilon": 0.02, "epsilon_high": 0.02},
        {
            "placement": "none",
            "advantage": GROUP_NORM,
            "weight": {"name": "dual_clip", "c": 1.05, "eps_low": 0.02, "eps_high": 0.02},
        },
    ),
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_policy(tmp_path_factory.mktemp("policy"))


def flat(model: Any) -> Tensor:
    return torch.cat([weight.detach().flatten().double() for weight in model.parameters()])


@pytest.mark.parametrize("name", NAMED)
def test_a_named_algorithm_takes_trls_own_steps(policy: Path, tmp_path: Path, name: str) -> None:
    """Four SGD steps of two micro-batches, two passes over each rollout; float32."""
    settings, objective = NAMED[name]
    training = {"updates_per_rollout": 2, "micro_batch": 8, "group_size": 4, "lr": 0.3, "clip_norm": None}
    cell = trl_cell(policy, objective, dtype="float32", trl={"optim": "sgd"}, **training)
    member = PackedCell(cell, load_task(cell.task), policy)
    ours = make_trainer(member, tmp_path / "ours")
    start = flat(ours.model)

    class Steps(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            take_or_leave_step(ours, given["optimizer"])

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ours.close_update()

    ours.add_callback(Steps())
    ours.train()
    reset_accelerate()

    examples = member.split("train")

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        texts = map(ours.text_of, completion_ids)  # TRL's own texts leave special tokens out
        return [member.task.score(examples[i], text).reward for i, text in zip(columns[EXAMPLE], texts, strict=True)]

    arguments = grpo_arguments(member, tmp_path / "theirs", 1, [1], on_cpu=True)
    theirs = GRPOTrainer(
        model=str(policy),
        reward_funcs=[reward],
        args=GRPOConfig(**{**arguments, **settings}),
        train_dataset=prompt_dataset(member),
        processing_class=read_tokenizer(policy),
    )
    theirs.model.get_input_embeddings().padding_idx = None
    theirs.train()
    reset_accelerate()
    moved = float((flat(theirs.model) - start).norm())
    error = float((flat(ours.model) - flat(theirs.model)).norm()) / moved
    print(f"{name:<16} moved {moved:.2e}, difference {error:.1e}")
    assert moved > 1e-2
    assert error < 1e-4


def test_two_processes_that_share_groups_make_klabs_updates(policy: Path, tmp_path: Path) -> None:
    """Three prompts of four completions: the second group is in both processes. Three micro-batches each."""
    grid = {
        "name": "ranks",
        "task": {"name": "letters_task:Letters"},
        "policy": {"name": "hf", "model": str(policy)},
        "training": {"prompts": 3, "group_size": 4, "updates_per_rollout": 2, "micro_batch": 2, "max_new_tokens": 4},
        "design": "list",
        "cells": [
            {"placement": "reward_to_go", "advantage": "position_norm", "kl_at": "current"},
            {"weight": "adaptive", "aggregation": "token_mean", "training.equal_groups": "drop"},
            {"estimator": "full", "placement": "advantage", "advantage": "batch_norm"},
        ],
    }
    file = tmp_path / "ranks.yaml"
    file.write_text(json.dumps(grid))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29713"]
    script = str(ROOT / "tests" / "support" / "trl_ranks.py")
    done = subprocess.run(
        [*command, script, str(file)], env=rank_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[{")]
    assert len(found) == 3
    for each in (each for listed in found for each in listed):
        assert each["gradient"] < 1e-5, each
        assert each["weights"] < 1e-4, each
        assert each["loss_trl"] == pytest.approx(each["loss_klab"], abs=1e-6)


KILLED = """
import sys
from klab.harness.engines.trl.run import train_cells
from klab.harness.store import Run
train_cells(sys.argv[1], Run.open(sys.argv[1]).cells)
"""


def test_a_kill_in_the_middle_changes_nothing(make_run: MakeRun) -> None:
    training = {"engine": "trl", "updates": 40, "updates_per_rollout": 2, "checkpoint_updates": 6, "evaluate_every": 10}
    quiet, killed = make_run("quiet", training), make_run("killed", training)
    (cell,) = quiet.cells
    assert train_cells(quiet.path, [cell]) == {cell: "finished"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(killed.path)], env=rank_environment())
    deadline = time.monotonic() + 120
    while int((killed.cell(cell).last_metrics() or {}).get("update", 0)) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert killed.cell(cell).result() is None
    assert train_cells(killed.path, [cell]) == {cell: "finished"}
    assert json.dumps(numbers(quiet, cell), sort_keys=True) == json.dumps(numbers(killed, cell), sort_keys=True)
    for name, value in weights(quiet, cell).items():
        torch.testing.assert_close(value, weights(killed, cell)[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 8.0}], ids=["whole", "lora"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2"])
def test_real_architectures_train_and_load(
    make_run: MakeRun, tmp_path: Path, family: str, lora: dict[str, Any] | None
) -> None:
    model = checkpoint(tmp_path / family, family, LETTERS)
    training = {"engine": "trl", "updates": 2, "updates_per_rollout": 2, "evaluate_every": 2, "evaluation_prompts": 2}
    run = make_run(
        training=training,
        task={"name": "letters_task:Ragged"},
        policy={"model": str(model), "lora": lora, "gradient_checkpointing": True},
    )
    (cell,) = run.cells
    assert train_cells(run.path, [cell]) == {cell: "finished"}, run.cell(cell).error()
    before, after = run.cell(cell).evaluations()
    assert before["reverse_kl"] == pytest.approx(0.0, abs=1e-9)
    assert after["reverse_kl"] > 0
    loader: Any = AutoModelForCausalLM if lora is None else AutoPeftModelForCausalLM
    trained = loader.from_pretrained(run.cell(cell).policy)
    start = AutoModelForCausalLM.from_pretrained(model)
    tokens = torch.tensor([[3, 4, 5]])
    assert not torch.equal(trained(tokens).logits, start(tokens).logits)


def test_learning_curves_of_both_engines_agree_within_seeds(make_run: MakeRun) -> None:
    common = {"updates": 40, "prompts": 8, "evaluate_every": 40, "checkpoint_updates": 999}
    finals = {}
    for engine in ("klab", "trl"):
        run = make_run(engine, {**common, "engine": engine}, [{"placement": "loss", "beta": 0.05}], seeds=4)
        (run_cells if engine == "klab" else train_cells)(run.path, run.cells)
        finals[engine] = [float((run.cell(cell).result() or {})["reward_final"]) for cell in run.cells]
    gap = mean(finals["trl"]) - mean(finals["klab"])
    error = (sum(stdev(values) ** 2 / len(values) for values in finals.values())) ** 0.5
    print(f"klab {finals['klab']}, trl {finals['trl']}, difference {gap:.3f} ± {error:.3f}")
    assert min(map(mean, finals.values())) > 0.25
    assert abs(gap) < 4 * max(error, 0.02)


def test_crosscheck_compares_both_engines(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {
        "name": "both",
        "task": {"name": "letters_task:Letters"},
        "policy": {"name": "hf", "model": str(policy)},
        "training": {"prompts": 2, "group_size": 3, "updates_per_rollout": 2, "max_new_tokens": 4},
        "axes": {"training.engine": ["klab", "trl"]},
    }
    monkeypatch.chdir(tmp_path)
    Path("both.yaml").write_text(json.dumps(grid))
    assert main(["crosscheck", "both.yaml", "--updates", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is True
    ((cell, rows),) = found["cells"].items()
    assert cell.startswith("k3-loss-token-ppo_clip-group_norm-s0-")
    assert [row["update"] for row in rows] == [1, 2]
    assert all(row["gradient"] < 1e-6 for row in rows)
