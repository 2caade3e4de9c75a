"""An emulated device, cells that train on it, and run folders."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from klab.harness.training import pack, runner
from tests.support.emulated_device.backend import register, use_emulated_devices
from tests.support.emulated_device.device import EmulatedDevices
from tests.support.random_checkpoints import checkpoint
from tests.support.run_folders import make_run, start
from tests.support.small_cells import LETTERS

__all__ = ["make_run", "start"]

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))  # for `letters_task:Letters` in grid files
register()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of two layers with grouped key and value heads that knows letters."""
    return checkpoint(tmp_path_factory.mktemp("qwen"), "Qwen2", LETTERS)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDevices]:
    """One emulated device, on which cells train."""
    with use_emulated_devices() as used:
        for module in (pack, runner):
            monkeypatch.setattr(module, "device", lambda: torch.device("emulated", 0))
        yield used
