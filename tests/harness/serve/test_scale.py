"""Ten thousand cells: what an answer holds, and what a look reads, does not grow with the run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from klab.harness.serve.live_run import LiveRun
from klab.harness.serve.runs_folder import RunsFolder
from klab.harness.store import Run
from tests.harness.serve.conftest import STUDY, Client
from tests.reports.synthetic import large_grid, write_run

CELLS = 10_000
KILOBYTES = 400
OPENED: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event in ("open", "os.listdir", "os.scandir"):
        OPENED.append(str(arguments[0]))


sys.addaudithook(_note)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Files and folders that were opened or listed meanwhile."""
    global OPENED
    OPENED = []
    yield OPENED
    OPENED = None


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 10,000 cells that have ended, but for 20 that wait."""
    run = write_run(
        tmp_path_factory.mktemp("runs") / "large",
        large_grid(CELLS // 5, 5, updates=2),
        only=lambda cell: cell.objective.weight == "power" and cell.seed == 0 and cell.training.lr < 1.01e-4,
    )
    assert len(run.cells) == CELLS
    model = next(run.path / "cells" / name for name in os.listdir(run.path / "cells"))
    contents = {path.name: path.read_bytes() for path in model.iterdir()}
    for identity in run.cells[:-20]:
        folder = run.cell(identity).path
        folder.mkdir(exist_ok=True)
        for name, data in contents.items():
            (folder / name).write_bytes(data)
    return run


def test_answers_are_small_however_many_cells(large: Run, serve: Callable[..., Client]) -> None:
    client = serve(large.path.parent)
    for path in (
        "runs",
        "runs/large",
        "runs/large/cells?size=100",
        "runs/large/cells?size=100&sort=reward&order=down&page=50",
        "runs/large/configurations?size=100",
        "runs/large/curves",
        "runs/large/curves?by=cell",
        "runs/large/completions",
        f"runs/large/cells/{large.cells[4321]}",
    ):
        reply = client.ask(f"/api/{path}")
        assert reply.status == 200, reply.body[:300]
        assert len(reply.body) < KILOBYTES * 1024, path
    assert client.get("runs/large/cells?size=100")["total"] == CELLS
    assert sum(client.get("runs/large")["states"].values()) == CELLS


def test_a_look_opens_what_changed_and_no_more(large: Run, opened: list[str]) -> None:
    live = LiveRun(large.path, every=0.0)
    live.refresh()
    states = live.head()["states"]
    assert states["waiting"] == 20
    opened.clear()
    live.refresh()
    few = len(opened)
    assert few < 15, opened
    version = live.version
    moving = [large.cell(identity) for identity in large.cells[-20:-10]]
    for cell in moving:
        cell.claim()
        cell.append_attempt({"event": "started", "at": time.time()})
        cell.write_heartbeat({"update": 1, "updates": 2, "reward": 0.5})
    opened.clear()
    live.refresh()
    assert live.version > version
    assert live.head()["states"]["running"] == 10
    assert len(opened) < few + 12 * len(moving), opened
    for cell in moving:
        cell.release_claim()
        for path in cell.path.iterdir():
            path.unlink()
        cell.path.rmdir()
    live.refresh()
    assert live.head()["states"] == states


def test_curves_that_nobody_looks_at_are_dropped(large: Run, opened: list[str]) -> None:
    live = LiveRun(large.path, every=0.0)
    live.refresh()
    for identity in large.cells[:2000]:
        live.curves.look(identity)
    assert len(live.curves) == 512
    opened.clear()
    for identity in large.cells[1900:2000]:
        live.curves.look(identity)
    assert opened == []


def test_runs_that_nobody_looks_at_are_closed(tmp_path: Path) -> None:
    names = [f"run-{number}" for number in range(5)]
    for name in names:
        write_run(tmp_path / name, STUDY.replace("little", name), outcome=lambda cell: "missing")
    folder = RunsFolder(tmp_path, every=0.0, most=30)
    first = folder.run(names[0])
    assert folder.run(names[0]) is first
    for name in names[1:]:
        folder.run(name)
        assert folder.cells_kept <= 30
    assert folder.run(names[4]) is folder.run(names[4])
    assert folder.run(names[0]) is not first
