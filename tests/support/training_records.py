"""What two runs of the same cell must have in common, and how to interrupt one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
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


def assert_close(left: Run, right: Run, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Every cell of two runs has the same records and weights but for rounding."""
    assert left.cells == right.cells
    for identity in left.cells:
        close(numbers(left, identity), numbers(right, identity), identity, rtol, atol)
        mine, theirs = weights(left, identity), weights(right, identity)
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol)


def close(left: Any, right: Any, where: str, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Two nested values are equal, numbers up to rounding; `where` names them."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for name in left:
            close(left[name], right[name], f"{where}/{name}", rtol, atol)
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for place, pair in enumerate(zip(left, right, strict=True)):
            close(*pair, f"{where}/{place}", rtol, atol)
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=rtol, abs=atol), where
    else:
        assert left == right, where


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
