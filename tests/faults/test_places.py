"""Run folders that are moved, read-only, or written under clocks that jump."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from klab.harness.dispatch.status import statuses
from klab.harness.store import Run
from tests.faults.conftest import MakeRun
from tests.faults.test_damage import stop_after
from tests.support.forked_runs import live, wait
from tests.support.small_cells import assert_same

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {"seeds": 2, "training": {"updates": 8, "checkpoint_updates": 1, "evaluate_every": 4}}


def test_a_moved_run_goes_on_where_it_was(make_run: MakeRun, finished: MakeRun, tmp_path: Path) -> None:
    quiet, run = finished("moved", **SETTINGS), make_run("moved", **SETTINGS)
    assert wait(live(run, lambda: stop_after(3))) == 2
    elsewhere = tmp_path / "another" / "disk" / "renamed"
    shutil.move(run.path, elsewhere)
    again = Run.open(elsewhere)
    assert [row.state for row in statuses(again)] == ["preempted"] * 2
    assert wait(live(again)) == 0
    assert_same(quiet, again)
    assert not run.path.exists()


def test_clocks_that_jump(make_run: MakeRun, finished: MakeRun) -> None:
    """A clock that jumps by years at every look: the same bits, and sober states."""
    quiet, run = finished("clock", **SETTINGS), make_run("clock", **SETTINGS)

    def jump() -> None:
        dice, now = random.Random(5), time.time
        time.time = lambda: now() + dice.uniform(-3e8, 3e8)

    def jump_and_stop() -> None:
        jump()
        stop_after(2)

    for _ in range(2):
        assert wait(live(run, jump_and_stop)) == 2
    assert [row.state for row in statuses(run)] == ["preempted"] * 2
    assert all(row.since is None or row.since >= 0 for row in statuses(run))
    assert wait(live(run, jump)) == 0
    assert_same(quiet, run)


@pytest.mark.parametrize("words", [["status"], ["logs", "CELL"], ["report"], ["launch"], ["cancel", "--yes"]])
def test_a_read_only_run_can_be_looked_at(
    make_run: MakeRun, finished: MakeRun, tmp_path: Path, words: list[str]
) -> None:
    """In a mount namespace of our own: root may write everywhere but to a file system that is mounted read-only."""
    run = finished("fixed", "runs", **SETTINGS)
    more = make_run("fixed", "runs", **{**SETTINGS, "seeds": 3})
    folder = tmp_path / "runs"
    target = (
        [str(tmp_path / "fixed.yaml"), "--runs", str(folder), "--on", "here", "--no-check"]
        if words == ["launch"]
        else [str(run.path)]
    )
    rest = [more.cells[0] if word == "CELL" else word for word in words[1:]]
    command = [sys.executable, "-m", "klab.harness.cli.main", words[0], *target, *rest]
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
    space = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*space, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here, hence no read-only file system of our own")
    done = subprocess.run(
        [*space, "sh", "-c", script, "sh", str(folder), *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    if words[0] in ("status", "logs"):
        assert done.returncode == 0, said
    else:
        assert "ead-only" in said or done.returncode == 0, said
    assert Run.open(run.path).cells == more.cells
