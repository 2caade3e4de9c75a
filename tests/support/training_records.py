"""What two runs of the same cell must have in common, and how to interrupt one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file

from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.harness.training.metrics import same_numbers

MakeRun = Callable[..., Run]
UNLIKE = ("versions", "hardware")


def numbers(run: Run, identity: str) -> dict[str, Any]:
    """Everything a cell recorded but times."""
    folder = run.cell(identity)
    result = folder.result()
    return {
        "metrics": [same_numbers(row) for row in folder.metrics()],
        "evaluations": [same_numbers(row) for row in folder.evaluations()],
        "result": None if result is None else {k: v for k, v in same_numbers(result).items() if k not in UNLIKE},
    }


def weights(run: Run, identity: str) -> dict[str, torch.Tensor]:
    """Of the final policy, or of its adapters."""
    (file,) = run.cell(identity).policy.glob("*.safetensors")
    return load_file(file)


def assert_same(left: Run, right: Run, identity: str) -> None:
    """Bit-equal records and weights of one cell in two runs."""
    assert numbers(left, identity) == numbers(right, identity)
    mine, theirs = weights(left, identity), weights(right, identity)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def finished(run: Run) -> Run:
    """The run after an undisturbed life of all of its cells in one pack."""
    assert set(run_cells(run.path, run.cells).values()) == {"finished"}
    return run


class StopAfter:
    """Asks to stop once this many updates have been made in this life."""

    def __init__(self, updates: int) -> None:
        self.left = updates

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0
