"""A request to stop is heard while the starting policy is still being made."""

from __future__ import annotations

from pathlib import Path

import pytest

from klab.grid import parse_grid
from klab.harness.store import Run
from klab.harness.training import run_cells

STUDY = """
name: impatient
task: {name: addition, digits: 3}
policy: {name: tiny, hidden: 8, layers: 1, heads: 2, intermediate: 8, warmup_accuracy: 0.5}
training: {updates: 2, prompts: 2, group_size: 2}
"""


def test_stopping_during_the_warm_up_leaves_nothing_behind_and_says_how_far_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.create(tmp_path / "run", parse_grid(STUDY, "impatient.yaml"))
    assert run_cells(run.path, run.cells, stop=lambda: True) == {run.cells[0]: "interrupted"}
    assert "held-out accuracy" in capsys.readouterr().err
    assert run.cell(run.cells[0]).error() is None
    assert not [folder for folder in run.policies.iterdir() if folder.is_dir()]
