"""Cells with a dataset and rewards of the user's own: parts are recorded, and a bad reward ends its cell alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from klab.grid import load_grid
from klab.harness.store import Run
from klab.harness.training import run_cells
from tests.support.small_cells import small_policy

TRAINING = {"updates": 2, "prompts": 2, "group_size": 2, "max_new_tokens": 4, "evaluate_every": 2}
EVALUATION = {"evaluation_prompts": 2, "evaluation_samples": 1}


def test_a_bad_reward_ends_its_cell_alone(write_rows: Callable[..., str], tmp_path: Path) -> None:
    module = "tests.tasks.user_rewards"
    rewards: list[object] = [
        [f"{module}:share", {"name": "format", "weight": 0.0}],
        f"{module}:hanging",
        f"{module}:undefined",
        f"{module}:shares",
    ]
    path = write_rows("sums.jsonl", *({"q": f"{i}+1=", "a": i + 1} for i in range(40)))
    grid = {
        "name": "rewards",
        "task": {"name": "file", "path": path, "prompt": "q", "answer": "a", "reward_seconds": 3.0},
        "policy": {"name": "hf", "model": str(small_policy(tmp_path / "start", "0123456789+="))},
        "training": {**TRAINING, **EVALUATION},
        "design": "list",
        "cells": [{"task.reward": reward} for reward in rewards],
    }
    file = tmp_path / "rewards.yaml"
    file.write_text(json.dumps(grid))
    run = Run.create(tmp_path / "run", load_grid(file))
    states = run_cells(run.path, run.cells)
    assert [states[identity] for identity in run.cells] == ["finished", "failed", "failed", "failed"]
    parts = run.cell(run.cells[0]).evaluations()[-1]["parts"]
    assert set(parts) == {"share", "format"}
    assert 0 < parts["share"] <= 1
    errors = [str(run.cell(identity).error()) for identity in run.cells[1:]]
    assert (
        "task.reward: tests.tasks.user_rewards:hanging gave no answer within 3 s; its process was stopped" in errors[0]
    )
    assert "task.reward.undefined: a reward must be finite (got nan)" in errors[1]
    assert f"did you mean '{module}:share'" in errors[2]
