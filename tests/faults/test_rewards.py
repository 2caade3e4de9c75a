"""Rewards that raise, return the wrong thing, hang, or take their process down, one cell each, in a real local pool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from klab.harness.dispatch.status import statuses
from tests.faults.conftest import MakeRun

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]
SAYS = {
    "": "",
    "raise": "the reward is broken",
    "type": "a task's score is a tasks.Score, not float",
    "hang": "no answer within 3 s",
    "memory": "out of memory in the reward",
    "kill": "worker process died",
}


def test_each_cell_fails_with_its_reason_and_the_sound_one_finishes(make_run: MakeRun, tmp_path: Path) -> None:
    cells = [{"task.trouble": trouble} for trouble in SAYS]
    run = make_run("troubles", cells=cells, training={"reward_seconds": 3.0})
    command = [
        sys.executable,
        "-m",
        "klab.harness.cli.main",
        "launch",
        "--no-check",
        tmp_path / "troubles.yaml",
        "--runs",
        tmp_path / "runs",
    ]
    done = subprocess.run(
        [*map(str, command), "--cells-per-job", "5"], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {run.resolved(row.id)["task"]["trouble"]: row for row in statuses(run)}
    assert {trouble: row.state for trouble, row in rows.items()} == {
        trouble: "failed" if says else "finished" for trouble, says in SAYS.items()
    }
    for trouble, says in SAYS.items():
        assert says in rows[trouble].detail
