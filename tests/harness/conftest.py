"""Grids of cells that train for seconds from a random policy, in a working folder of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Grid, load_grid
from tests.support.run_processes import end_all
from tests.support.small_cells import small_policy

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer that knows digits."""
    return small_policy(tmp_path_factory.mktemp("start"), "0123456789+=")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the tasks of `slow_tasks.py`; whatever still runs there at the end is killed."""
    shutil.copy(SUPPORT / "slow_tasks.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield tmp_path
    end_all(tmp_path)


@pytest.fixture
def make_grid(place: Path, digits: Path) -> Callable[..., Grid]:
    """A grid file and its grid; `training`, `task` and `resources` change the settings of all cells."""

    def make(
        name: str = "little",
        cells: Sequence[dict[str, Any]] = ({},),
        seeds: int = 1,
        task: dict[str, Any] | None = None,
        resources: dict[str, Any] | None = None,
        **training: Any,
    ) -> Grid:
        settings = {
            "updates": 4,
            "prompts": 2,
            "group_size": 2,
            "lr": 0.01,
            "evaluate_every": 1000,
            "evaluation_prompts": 2,
            "evaluation_samples": 2,
            "final_evaluation_samples": 2,
            "checkpoint_updates": 2,
        }
        text = {
            "name": name,
            "task": task or {"name": "addition", "digits": 1},
            "policy": {"name": "hf", "model": str(digits)},
            "training": {**settings, **training},
            "design": "list",
            "cells": list(cells),
            "seeds": seeds,
            "resources": resources or {},
        }
        file = place / f"{name}.yaml"
        file.write_text(json.dumps(text))
        return load_grid(file)

    return make
