"""Small runs, and lives of their cells in forked processes that may be killed or sabotaged."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from klab.grid import load_grid
from klab.harness.store import Run
from tests.support.forked_runs import live, wait
from tests.support.small_cells import small_policy, write_grid

MakeRun = Callable[..., Run]


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is room: a kill does not care for disks, and thousands of small writes are synced."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 2**28:
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="klab-faults-", dir=memory))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def make_run(policy: Path, tmp_path: Path) -> MakeRun:
    """`make_run(name, where="runs", **settings of write_grid)`: a fresh run folder."""

    def make(name: str = "little", where: str = "runs", **settings: Any) -> Run:
        grid = load_grid(write_grid(tmp_path / f"{name}.yaml", policy, **settings))
        return Run.create(tmp_path / where / name, grid)

    return make


@pytest.fixture
def finished(make_run: MakeRun) -> MakeRun:
    """As `make_run`, after an undisturbed life."""

    def make(name: str = "little", where: str = "quiet", **settings: Any) -> Run:
        run = make_run(name, where, **settings)
        assert wait(live(run)) == 0
        assert all(run.cell(cell).result() for cell in run.cells)
        return run

    return make
