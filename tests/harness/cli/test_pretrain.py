"""`klab pretrain`: a model of its own, made once, and the same that a launch of the grid would start from."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.harness.store import Run
from tests.support.fruit_task import Fruit

Ask = Callable[..., Any]
POLICY = {
    "name": "small",
    "hidden": 16,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "intermediate": 16,
    "vocabulary": 300,
    "warmup_accuracy": 0.2,
}


TRAINING = {
    "updates": 2,
    "prompts": 2,
    "group_size": 2,
    "evaluation_prompts": 2,
    "evaluation_samples": 1,
    "final_evaluation_samples": 1,
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A grid file in the working directory, which is empty but for its task."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(inspect.getfile(Fruit), "fruit.py")

    def grid(**changes: Any) -> str:
        task = {"name": "./fruit.py:Fruit"}
        study = {"name": "study", "task": task, "policy": POLICY, "training": TRAINING, **changes}
        Path("study.yaml").write_text(json.dumps(study))
        return "study.yaml"

    return grid


def test_the_model_is_what_a_launch_starts_from_and_another_study_may_name_it(
    write: Callable[..., str], ask: Ask, tmp_path: Path
) -> None:
    made = ask("pretrain", write(), "--out", "models/fruit", "--json")
    assert made["made"]
    assert 0.2 <= made["accuracy"] <= 0.5
    weights = (tmp_path / "models/fruit/model.safetensors").read_bytes()
    again = ask("pretrain", "study.yaml", "--out", "models/fruit", "--json")
    assert again == {**made, "made": False}

    ask("launch", "study.yaml", "--on", "here")
    (start,) = (each for each in Run.open(tmp_path / "runs/study").policies.iterdir() if each.is_dir())
    assert (start / "model.safetensors").read_bytes() == weights

    named = write(name="named", policy={"name": "hf", "model": "models/fruit"})
    assert "1 finished" in ask("launch", named, "--on", "here")
    (record,) = (
        each for label, each in Run.open(tmp_path / "runs/named").manifest["inputs"].items() if "model" in label
    )
    assert len(record["sha256"]) == 64


def test_what_cannot_be_made_is_said(write: Callable[..., str], ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert "--out: holds something else" in ask("pretrain", write(), "--out", "mine", code=2)
    several = write(axes={"policy.hidden": [16, 32]})
    assert "start from 2 policies" in ask("pretrain", several, "--out", "model", code=2)
    finished = write(policy={"name": "hf", "model": "mine"})
    assert "is a model already" in ask("pretrain", finished, "--out", "model", code=2)
    assert not (tmp_path / "model").exists()
    wide = write(policy={**POLICY, "vocabulary": 258})
    assert "policy.vocabulary" in ask("pretrain", wide, "--out", "model", code=2)


def test_a_small_policy_needs_solutions(write: Callable[..., str], ask: Ask) -> None:
    told = ask("plan", write(task={"name": "./fruit.py:Mute"}), code=2)
    assert "needs reference solutions" in told
