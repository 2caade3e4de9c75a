"""The private cluster that `make slurm-test` started, and a place to launch small grids on it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from klab.grid import load_grid
from klab.harness.dispatch.status import CellStatus, statuses
from klab.harness.store import Run
from tests.slurm.cluster import Cluster
from tests.slurm.processes import wait_for
from tests.support.small_cells import small_policy, write_grid

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="no private Slurm cluster: run `make slurm-test`")
    for item in items:
        if here in item.path.parents and item.get_closest_marker("slurm") and not os.environ.get("KLAB_TEST_SLURM"):
            item.add_marker(skip)


class Lab:
    """A cluster, a folder for runs, and klab's command."""

    def __init__(self, cluster: Cluster, folder: Path, policy: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.policy = policy
        self.working_folder = ROOT

    def grid(self, name: str, **settings: Any) -> Path:
        """A grid file; see `tests.support.small_cells.write_grid`."""
        return write_grid(self.folder / f"{name}.yaml", self.policy, **settings)

    def klab(self, *words: str | Path, code: int = 0) -> str:
        """Run klab to its end, check its exit code, and return what it said."""
        done = self.start(*words)
        text, _ = done.communicate(timeout=180)
        assert done.returncode == code, text
        return text

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        """Start klab; launches leave checks out, for some of these cells are meant to fail."""
        words = (*words, "--no-check") if words[0] == "launch" else words
        command = [sys.executable, "-m", "klab.harness.cli.main", *map(str, words), "--runs", str(self.folder / "runs")]
        return subprocess.Popen(
            command,
            cwd=self.working_folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def launch(self, grid: Path, *flags: str, code: int = 0) -> Run:
        """`klab launch GRID --on slurm`, and the run."""
        self.klab("launch", grid, "--on", "slurm", *flags, code=code)
        return self.run(grid)

    def run(self, grid: Path) -> Run:
        return Run.open(self.folder / "runs" / grid.stem)

    def undisturbed(self, grid: Path) -> Run:
        """The same cells after one quiet life in this process."""
        from klab.harness.training import run_cells

        run = Run.create(self.folder / "quiet" / grid.stem, load_grid(grid))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KLAB_TEST_HURRY", "1")
            assert set(run_cells(run.path, run.cells).values()) == {"finished"}
        return run

    def until(self, run: Run, done: Callable[[list[CellStatus]], bool], seconds: float = 600) -> list[CellStatus]:
        """Wait until the cells' states are as wanted, and return them."""
        deadline = time.monotonic() + seconds
        while not done(rows := statuses(run)):
            assert time.monotonic() < deadline, [(row.state, row.update, row.job, row.detail) for row in rows]
            time.sleep(0.3)
        return rows

    def until_finished(self, run: Run, seconds: float = 600) -> None:
        self.until(run, lambda rows: all(row.state == "finished" for row in rows), seconds)

    def until_update(self, run: Run, update: int, seconds: float = 90) -> None:
        """Wait until the first cell has made that many updates."""
        folder = run.cell(run.cells[0])
        wait_for(f"update {update}", lambda: int((folder.last_metrics() or {}).get("update", 0)) >= update, seconds)

    def tell(self, *command: str) -> str:
        return self.cluster.tell(*command)

    def job(self, run: Run) -> str:
        """The newest job of the first cell."""
        return str(statuses(run)[0].job)


def starts(run: Run) -> list[int]:
    """How often each cell was started."""
    return [sum(event["event"] == "started" for event in run.cell(cell).attempts()) for cell in run.cells]


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    os.environ["KLAB_CONFIG"] = "/dev/null"
    found = Cluster(Path(os.environ["KLAB_TEST_SLURM"]), accounting=os.environ.get("KLAB_TEST_ACCOUNTING") != "0")
    os.environ["SLURM_CONF"] = str(found.conf)
    os.environ["OMP_NUM_THREADS"] = "1"
    return found


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def lab(cluster: Cluster, policy: Path, tmp_path: Path) -> Iterator[Lab]:
    """A laboratory whose jobs are gone, and whose nodes are ready, after the test."""
    found = Lab(cluster, tmp_path, policy)
    yield found
    cluster.start()
    cluster.tell("scancel", "--quiet", "--me")
    wait_for("jobs to end", lambda: not cluster.tell("squeue", "-h"), 30)
