"""SIGKILL at random times, of everything that klab starts: the final bits are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from klab.harness.dispatch.local.queue_files import lock_path
from klab.harness.dispatch.status import statuses
from klab.harness.store import ProcessId, Run, scan
from klab.harness.store.lock import read_lock
from tests.faults.conftest import MakeRun
from tests.support.forked_runs import live, wait
from tests.support.small_cells import assert_same

pytestmark = pytest.mark.faults
KILLS = int(os.environ.get("KLAB_TEST_KILLS", "120"))
ROOT = Path(__file__).parents[2]
CELLS = [{"weight": "ppo_clip"}, {"weight": "one"}, {"training.updates_per_rollout": 2}]


@pytest.fixture
def dice() -> random.Random:
    seed = int(os.environ.get("KLAB_TEST_SEED", time.time_ns() % 2**32))
    print(f"\nKLAB_TEST_SEED={seed}")
    return random.Random(seed)


def test_workers_killed_over_and_over(make_run: MakeRun, finished: MakeRun, dice: random.Random) -> None:
    """Lives of some tenths of a second, until enough of them were killed; then every run is finished in peace."""
    settings = {"cells": CELLS, "seeds": 2, "training": {"updates": 24, "checkpoint_updates": 1, "evaluate_every": 6}}
    quiet = finished("soak", **settings)
    kills = 0
    runs: list[Run] = []
    times: list[bool] = []
    while kills < KILLS:
        runs.append(make_run("soak", f"runs{len(runs)}", **settings))
        while kills < KILLS and not all(runs[-1].cell(cell).result() for cell in runs[-1].cells):
            killed = wait(live(runs[-1]), dice.uniform(0.0, 0.6)) == -signal.SIGKILL
            kills += killed
            times.append(killed)
    for run in runs:
        assert wait(live(run)) == 0
        assert_same(quiet, run)
    print(f"{kills} kills in {len(times)} lives, {len(runs)} runs of {len(quiet.cells)} cells, records lost: 0")


def test_launchers_controllers_and_workers_killed(
    make_run: MakeRun, finished: MakeRun, dice: random.Random, tmp_path: Path
) -> None:
    settings = {"cells": CELLS, "seeds": 2, "task": {"seconds": 0.01}}
    settings |= {"training": {"updates": 60, "checkpoint_updates": 1, "evaluate_every": 20}}
    quiet = finished("storm", **settings)
    run = make_run("storm", **settings)
    launch = [sys.executable, "-m", "klab.harness.cli.main", "launch", tmp_path / "storm.yaml", "--no-check"]
    launch += ["--runs", tmp_path / "runs", "--max-parallel", "2", "--cells-per-job", "3"]
    killed = {"launcher": 0, "controller": 0, "worker": 0}
    try:
        for _ in range(max(12, KILLS // 8)):
            if not _controllers(run) or dice.random() < 0.3:
                launcher = subprocess.Popen(
                    [*map(str, launch), "--detach"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                if dice.random() < 0.3:
                    time.sleep(dice.uniform(0.0, 1.5))
                    launcher.kill()
                    killed["launcher"] += 1
                launcher.wait()
            time.sleep(dice.uniform(0.0, 5.0))
            kind = dice.choice(["controller", "worker", "worker"])
            victims = _controllers(run) if kind == "controller" else _workers(run)
            if victims:
                os.kill(dice.choice(victims), signal.SIGKILL)
                killed[kind] += 1
        done = subprocess.run(
            [*map(str, launch), "--retry-failed"], cwd=ROOT, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        for pid in _controllers(run) + _workers(run):
            os.kill(pid, signal.SIGKILL)
    assert {row.state for row in statuses(run)} == {"finished"}
    assert_same(quiet, run)
    print(f"kills: {killed}; records lost: 0")


def _controllers(run: Run) -> list[int]:
    holder = ProcessId.from_record(read_lock(lock_path(run)) or {})
    return [holder.pid] if holder is not None and holder.is_alive() else []


def _workers(run: Run) -> list[int]:
    holders = (ProcessId.from_record(snapshot.claim or {}) for snapshot in scan(run).values())
    return sorted({holder.pid for holder in holders if holder is not None and holder.is_alive()})
