"""`klab launch --on slurm`: arrays, caps, failures, launchers that die or meet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from klab.harness.dispatch.slurm.backend import SlurmExecutor
from klab.harness.dispatch.slurm.submission import submissions
from klab.harness.dispatch.status import statuses
from tests.slurm.conftest import ROOT, Lab, starts
from tests.slurm.processes import wait_for
from tests.support.small_cells import assert_same

pytestmark = pytest.mark.slurm


def test_a_grid_of_thirty_cells_in_chunked_arrays_shares_one_cap(lab: Lab) -> None:
    """15 jobs of two cells, in three arrays because the cluster allows six tasks each, four jobs at a time."""
    lab.cluster.settings["MaxArraySize"] = "6"
    lab.cluster.start()
    try:
        grid = lab.grid("thirty", seeds=30, training={"updates": 2})
        shown = lab.klab("launch", grid, "--on", "slurm", "--dry-run", "--max-parallel", "4", "--cells-per-job", "2")
        run = lab.launch(grid, "--max-parallel", "4", "--cells-per-job", "2")
        written = [(each.folder / f"{each.job}_submission.sh").read_text() for each in submissions(run)]
        assert [len(each.cells) for each in submissions(run)] == [5, 5, 5]
        assert _plain(shown) == _plain("\n".join(written))
        lab.until_finished(run, 240)
    finally:
        del lab.cluster.settings["MaxArraySize"]
        lab.cluster.start()
    lives = [(event["event"], event["at"]) for cell in run.cells for event in run.cell(cell).attempts()]
    running = most = 0
    for event, _ in sorted(lives, key=lambda life: life[1]):
        running += 1 if event == "started" else -1
        most = max(most, running)
    assert 4 < most <= 8  # four jobs of two cells
    assert starts(run) == [1] * 30
    print(f"30 cells, {len(lives)} events, at most {most} cells at a time")


def test_a_failing_cell_fails_alone(lab: Lab) -> None:
    cells = [{"task.trouble": trouble} for trouble in ("", "raise", "exit")]
    run = lab.launch(lab.grid("failing", cells=cells))
    rows = lab.until(run, lambda rows: all(row.state in ("finished", "failed") for row in rows))
    assert [row.state for row in rows] == ["finished", "failed", "failed"]
    assert "the reward is broken" in rows[1].detail
    assert "exit code 3" in rows[2].detail or rows[2].detail.startswith("FAILED")
    assert "the reward is broken" in lab.klab("logs", run.path, rows[1].id)
    lab.klab("status", run.path, code=1)
    lab.klab("launch", lab.folder / "failing.yaml", "--on", "slurm")
    assert starts(run) == [1, 1, 1]
    lab.klab("launch", lab.folder / "failing.yaml", "--on", "slurm", "--retry-failed")
    wait_for("the second try", lambda: starts(run) == [1, 2, 2], 60)


@pytest.mark.parametrize("point", ["intent", "sbatch", "id"])
def test_a_launcher_killed_at_the_worst_moment_loses_and_doubles_nothing(lab: Lab, point: str) -> None:
    """Killed before sbatch, after it but before the pickles are in place, or before it noted the job's id."""
    grid = lab.grid("killed", seeds=3, training={"updates": 2})
    dead = subprocess.run(
        [sys.executable, "-m", "tests.slurm.dying_launcher", point, grid, lab.folder / "runs"], cwd=ROOT
    )
    assert dead.returncode == -9
    run = lab.run(grid)
    assert [each.job for each in submissions(run)] == [None]
    states = {row.state for row in statuses(run)}
    assert states <= ({"waiting"} if point == "intent" else {"queued", "running", "finished"})
    lab.launch(grid)
    lab.until_finished(run)
    assert starts(run) == [1, 1, 1]
    assert [each.job is not None for each in submissions(run)] == [True]


def test_two_launchers_submit_every_cell_once(lab: Lab) -> None:
    grid = lab.grid("both", seeds=4, training={"updates": 2})
    launchers = [lab.start("launch", grid, "--on", "slurm") for _ in range(3)]
    said = [launcher.communicate(timeout=60)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0, 0], said
    run = lab.run(grid)
    assert sorted(cell for each in submissions(run) for cells in each.cells for cell in cells) == sorted(run.cells)
    lab.until_finished(run)
    assert starts(run) == [1] * 4
    lab.launch(grid)
    assert len(submissions(run)) == 1


def test_resources_reach_the_job(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grid file < profile < flags, as Slurm sees them."""
    config = lab.folder / "config.yaml"
    config.write_text("profiles: {emulated: {gpus: 1, minutes: 30, cpus: 2, partition: low}}")
    monkeypatch.setenv("KLAB_CONFIG", str(config))
    resources = {"cpus": 1, "gpus": 2, "minutes": 10, "setup": ["export SEEN=yes"], "profile": "emulated"}
    grid = lab.grid("resources", resources={**resources, "sbatch": {"comment": "from the grid"}})
    run = lab.launch(grid, "--partition", "high", "--exclude", "n1")
    job = lab.tell("scontrol", "show", "job", "-o", lab.job(run))
    for part in ("Partition=high", "TimeLimit=00:30:00", "CPUs/Task=2", "ExcNodeList=n1", "Comment=from"):
        assert part in job
    assert "gpu:1" in job
    lab.until_finished(run)
    started = run.cell(run.cells[0]).attempts()[0]
    assert started["gpu"] in ("0", "1")
    lab.klab("launch", lab.grid("wrong"), "--on", "slurm", "--partition", "nowhere", code=2)


def test_a_thousand_cells(lab: Lab) -> None:
    """1,000 trivial cells in packs of 100; what is printed are the figures of the README."""
    import time

    grid = lab.grid("thousand", seeds=1000, training={"updates": 1, "evaluate_every": 1})
    began = time.monotonic()
    run = lab.launch(grid, "--cells-per-job", "100")
    launched = time.monotonic()
    rows = statuses(run)
    asked = time.monotonic()
    assert len(rows) == 1000
    assert {row.state for row in rows} <= {"queued", "running"}
    lab.until_finished(run, 400)
    ended = time.monotonic()
    assert starts(run) == [1] * 1000
    print(
        f"1,000 cells: launched in {launched - began:.1f} s, status in {asked - launched:.2f} s, "
        f"trained in {ended - launched:.0f} s"
    )


def test_the_same_bits_as_in_this_process(lab: Lab) -> None:
    grid = lab.grid("same", seeds=2, training={"updates": 3})
    run = lab.launch(grid)
    lab.until_finished(run)
    assert_same(run, lab.undisturbed(grid))


def test_cancel_asks_before_it_stops_more_than_one(lab: Lab) -> None:
    grid = lab.grid("cancelled", seeds=3, task={"seconds": 0.2}, training={"updates": 100})
    run = lab.launch(grid, "--max-parallel", "2")
    lab.until(run, lambda rows: [row.state for row in rows] == ["running", "running", "queued"])
    assert "2 running cells" in lab.klab("cancel", run.path, code=2)
    lab.klab("cancel", run.path, run.cells[2])
    lab.until(run, lambda rows: [row.state for row in rows] == ["running", "running", "cancelled"])
    lab.klab("cancel", run.path, "--yes")
    wait_for("the queue to be empty", lambda: not lab.tell("squeue", "-h"), 30)
    assert {row.state for row in statuses(run)} == {"cancelled"}
    assert SlurmExecutor().states(run)[run.cells[0]].state == "cancelled"


def test_held_jobs_wait_until_they_are_released(lab: Lab) -> None:
    grid = lab.grid("held", seeds=3, task={"seconds": 0.1}, training={"updates": 30})
    run = lab.launch(grid, "--max-parallel", "1")
    lab.until(run, lambda rows: [row.state for row in rows] == ["running", "queued", "queued"])
    second = run.cells[1]
    assert "1 waiting cells held" in lab.klab("hold", run.path, second)
    assert "JobHeld" in lab.tell("squeue", "-h", "-r", "-o", "%i %r")
    lab.until(run, lambda rows: [row.state for row in rows] == ["finished", "held", "finished"])
    assert not run.cell(second).metrics()
    lab.launch(grid)  # launching again does not release it
    assert statuses(run)[1].state == "held"
    assert "1 cells released, which start by themselves" in lab.klab("release", run.path)
    lab.until_finished(run)
    assert starts(run) == [1, 1, 1]


def _plain(text: str) -> list[str]:
    """Scripts without what differs from one submission to the next: the random part of names, and jobs' numbers."""
    kept = [
        line for line in text.splitlines() if line and not line.startswith(("#SBATCH --job-name", "#SBATCH --depend"))
    ]
    return kept


def test_jobs_find_code_by_import_path_and_by_file_and_nothing_in_its_way(lab: Lab, tmp_path: Path) -> None:
    """In a folder with files that are called as what is installed; each job loads the user's own from there."""
    soft = "def soft(ratio, advantage):\n    return ratio.tanh()\n"
    for name in ("grid", "reports", "yaml", "random", "torch", "submitit"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('this file was imported')\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "queue.py").write_text("from queue import SimpleQueue\n" + soft)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/weights.py").write_text("from .aside import soft\n")
    (tmp_path / "more/aside.py").write_text(soft)
    grid = lab.grid("collisions", cells=[{"weight": "queue:soft"}, {"weight": f"{tmp_path}/more/weights.py:soft"}])
    text = grid.read_text().replace("tests.support.small_cells:", f"{ROOT}/tests/support/small_cells.py:")
    grid.write_text(text)
    lab.working_folder = tmp_path
    run = lab.launch(grid)
    lab.until_finished(run)
    assert starts(run) == [1, 1]
