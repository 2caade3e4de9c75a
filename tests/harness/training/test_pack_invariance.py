"""Where a pack would change its cells' bits, each is trained alone: the promise holds, whatever the kernels are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.harness.training.runtime.pack_invariance import pack_invariant
from tests.support.training_records import MakeRun, assert_same, finished

pytestmark = pytest.mark.bits
OBJECTIVES: list[dict[str, Any]] = [{}, {"estimator": "full", "placement": "loss"}]
ADAPTERS = {"lora": {"rank": 4}}
UNFIXED = """
import sys
import torch
torch.ones(64, 64) @ torch.ones(64, 64)  # MKL has read its environment
from klab.harness.training import run_cells
from klab.harness.training.runtime.pack_invariance import pack_invariant
sys.path.insert(0, sys.argv[1])
packed, alone, *cells = sys.argv[2:]
torch.set_num_threads(1)
print(pack_invariant())
run_cells(packed, cells)
for cell in cells:
    run_cells(alone, [cell])
"""
SEPARATED = "cells train one after another"


@pytest.fixture
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def all_same(packed: Run, alone: Run) -> None:
    for cell in alone.cells:
        assert_same(packed, alone, cell)


def test_with_kernels_that_nobody_fixed(make_run: MakeRun) -> None:
    packed, alone = (make_run(name, objectives=OBJECTIVES, seeds=2, policy=ADAPTERS) for name in ("packed", "alone"))
    clean = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    command = [sys.executable, "-c", UNFIXED, sys.path[0], str(packed.path), str(alone.path), *packed.cells]
    done = subprocess.run(
        command, env=clean | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (SEPARATED in done.stderr) == (done.stdout.split()[0] == "False")
    all_same(packed, alone)


@pytest.mark.usefixtures("_threads")
def test_with_several_threads(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    packed, alone = (make_run(name, {"updates": 2}, seeds=2) for name in ("packed", "alone"))
    assert set(run_cells(packed.path, packed.cells, threads=2).values()) == {"finished"}
    assert "2 " + SEPARATED in capsys.readouterr().err
    for cell in alone.cells:
        run_cells(alone.path, [cell], threads=2)
    all_same(packed, alone)


def test_a_pack_stays_one_where_it_changes_nothing(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    finished(make_run(objectives=OBJECTIVES))
    assert (SEPARATED in capsys.readouterr().err) == (not pack_invariant())
