"""A random tiny policy, and run folders made of a few lines of settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from klab.grid import load_grid
from klab.harness.store import Run
from tests.support.small_cells import small_policy

SUPPORT = Path(__file__).parents[2] / "support"
sys.path.insert(0, str(SUPPORT))  # for `letters_task:Letters` in grid files

TRAINING: dict[str, Any] = {
    "updates": 6,
    "prompts": 4,
    "group_size": 4,
    "lr": 0.01,
    "evaluate_every": 3,
    "evaluation_prompts": 6,
    "evaluation_samples": 3,
    "checkpoint_updates": 1,
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a random Llama with 7 tokens and one layer."""
    return small_policy(tmp_path_factory.mktemp("start"))


@pytest.fixture
def make_run(start: Path, tmp_path: Path) -> Callable[..., Run]:
    """A run folder with one cell per objective (the changes of a cell in a list design) and seed."""

    def make(
        name: str = "run",
        training: Mapping[str, Any] | None = None,
        objectives: list[dict[str, Any]] | None = None,
        seeds: int | list[int] = 1,
        task: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> Run:
        grid = {
            "name": name,
            "task": {"name": "letters_task:Letters", **(task or {})},
            "policy": {"name": "hf", "model": str(start), **(policy or {})},
            "training": {**TRAINING, **(training or {})},
            "objective": {},
            "design": "list",
            "cells": objectives or [{}],
            "seeds": seeds,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(grid))
        return Run.create(tmp_path / name, load_grid(file))

    return make
