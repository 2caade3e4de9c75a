"""A random tiny policy, and run folders made of a few lines of settings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.support.run_folders import make_run, start

__all__ = ["make_run", "start"]

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))  # for `letters_task:Letters` in grid files


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
