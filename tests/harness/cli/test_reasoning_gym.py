"""Three datasets of reasoning-gym on tiny policies, from plan to report; and what plan says where that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from klab.grid import load_grid
from klab.harness.store import Run

Ask = Callable[..., Any]

TASKS = [
    {"dataset": "spell_backward", "parameters": {"min_word_len": 3, "max_word_len": 3}, "prompt": "{word}>"},
    {"dataset": "count_bits", "parameters": {"max_n": 500}, "prompt": "{number}="},
    {"dataset": "products", "parameters": {"max_digits": 1}, "prompt": "{expression}="},
]


def written(place: Path, task: Any, **more: Any) -> Path:
    policy = {"hidden": 32, "layers": 1, "heads": 2, "warmup_accuracy": 0.21, "warmup_updates_max": 300}
    training = {"updates": 3, "prompts": 4, "group_size": 4, "evaluate_every": 3, "evaluation_prompts": 16}
    grid = {"name": "problems", "policy": {"name": "tiny", **policy}, "training": training, "task": task, **more}
    file = place / "problems.yaml"
    file.write_text(json.dumps({**grid, "training": {**training, "final_evaluation_samples": 4}}))
    return file


def test_three_datasets_train_from_plan_to_report(place: Path, ask: Ask) -> None:
    named: list[dict[str, Any]] = [{"name": "reasoning_gym", **task} for task in TASKS]
    file = written(place, named[0], axes={"task": named})
    assert len(ask("plan", file.name, "--json")["cells"]) == 3
    assert "3 finished" in ask("launch", file.name, "--on", "here")
    run = Run.open(place / "runs/problems")
    for identity in run.cells:
        folder = run.cell(identity)
        first, last = folder.evaluations()[0], folder.evaluations()[-1]
        assert (first["update"], last["update"]) == (0, 3)
        assert 0.0 < first["reward"] <= 1.0, "the policy was warmed up on the datasets' answers"
        assert 0.0 <= last["reward"] <= 1.0
        assert any(row["reward_std"] > 0 for row in folder.metrics())
        result = folder.result()
        assert result is not None
        assert result["versions"]["reasoning-gym"] == version("reasoning-gym")
        assert result["reward_timeouts"] == 0
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["inputs"]["task.name reasoning_gym"] == {"commit": version("reasoning-gym")}
    table = ask("report", "problems", "--format", "csv", "--no-gradients")
    assert "count_bits" in table
    assert "spell_backward" in table


def test_plan_says_where_a_dataset_is_too_large_for_a_tiny_policy(place: Path, ask: Ask) -> None:
    task = {"name": "reasoning_gym", "dataset": "zebra_puzzles", "size": 3, "held_out": 2}
    said = ask("plan", written(place, task).name, code=2)
    assert "policy.name: a tiny policy needs an alphabet" in said
    assert "zebra_puzzles has prompts with" in said
    assert "policy: {name: hf, model: …}" in said


def test_plan_names_the_nearest_dataset_and_parameters_may_be_axes(place: Path, ask: Ask) -> None:
    said = ask("plan", written(place, {"name": "reasoning_gym", "dataset": "chain_sums"}).name, code=2)
    assert "unknown dataset (got 'chain_sums'); did you mean 'chain_sum'?" in said
    task = {"name": "reasoning_gym", "dataset": "chain_sum", "size": 50, "held_out": 5, "prompt": "{expression}="}
    axes = {"task.parameters.max_terms": [2, 3], "task.level": [0, 1]}
    cells = load_grid(written(place, task, axes=axes)).cells
    assert {(cell.task.parts[0].parameters.values["max_terms"], cell.task.level) for cell in cells} == {  # type: ignore[union-attr]
        (2, 0),
        (2, 1),
        (3, 0),
        (3, 1),
    }
