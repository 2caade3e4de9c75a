"""A run folder from anybody: a file that is no ordinary one, or far too large, ends in one message, soon."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from klab.grid import UserError
from klab.harness.dispatch.status import statuses
from klab.harness.store import Run, files
from klab.harness.store.metrics_reader import read_metric_columns

GIGABYTE = 2**30


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is limited to a hundred characters
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def zeros(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(GIGABYTE)


def one_long_line(path: Path) -> None:
    path.write_bytes(b'{"schema":1,"update":1,"text":"' + b"x" * (files.LINE_BYTES + 2**15) + b'"}\n')


STRANGE = [fifo, link, loop, device, folder, listening, zeros]
NAMES = ["result.json", "attempts.jsonl", "heartbeat", "claim", "error.txt", "metrics.jsonl", "evaluations.jsonl"]


@pytest.mark.parametrize("make", STRANGE)
def test_no_stored_file_is_read_unless_it_is_an_ordinary_one(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "stored"
    make(path)
    for read in (files.read_record, files.read_lines, files.last_line):
        with pytest.raises(UserError, match="stored"):
            read(path)  # type: ignore[operator]
    assert read_metric_columns({"cell": path}) == {}


def test_a_line_has_a_largest_length(tmp_path: Path) -> None:
    one_long_line(tmp_path / "attempts.jsonl")
    with pytest.raises(UserError, match="line of more than 1 MiB"):
        files.last_line(tmp_path / "attempts.jsonl")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """500 MB of address space beyond what this process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 10**6, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("make", STRANGE)
def test_the_state_of_every_cell_is_found_among_strange_files(
    run: Run, make: Callable[[Path], None], little_memory: None
) -> None:
    cell = run.cell(run.cells[0])
    cell.append_attempt({"event": "started", "at": 1.0})
    for name in NAMES:
        path = cell.path / name
        path.unlink(missing_ok=True)
        make(path)
        (row, *others) = statuses(Run.open(run.path))
        assert row.state in ("failed", "lost", "running", "waiting")
        assert {other.state for other in others} == {"waiting"}
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("make", STRANGE)
@pytest.mark.parametrize("name", ["manifest.json", "index.json", "jobs/local-request.json", "jobs/local-state.json"])
def test_a_strange_file_of_the_run_is_refused_or_not_used(
    run: Run, name: str, make: Callable[[Path], None], little_memory: None
) -> None:
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    if name == "manifest.json":
        with pytest.raises(UserError, match="manifest"):
            Run.open(run.path)
    else:
        assert {row.state for row in statuses(Run.open(run.path))} == {"waiting"}


def test_files_follow_the_umask(tmp_path: Path) -> None:
    """A group can share a run folder."""
    program = """
import os, sys
os.umask(0o002)
from pathlib import Path
from klab.grid import load_grid
from klab.harness.store import Run
run = Run.create(Path(sys.argv[1]) / "run", load_grid(sys.argv[2]))
cell = run.cell(run.cells[0])
with run.lock():
    cell.claim()
    cell.append_metrics([{"update": 1}])
    cell.append_attempt({"event": "started", "at": 1.0})
    cell.write_heartbeat({"update": 1})
    cell.record_failure("no")
    for path in [Path(sys.argv[1]) / "run", *(Path(sys.argv[1]) / "run").rglob("*")]:
        print(oct(path.stat().st_mode & 0o777), path.is_dir(), path)
"""
    grid = tmp_path / "little.yaml"
    grid.write_text(
        "name: little\ntask: {name: addition}\npolicy: {name: tiny}\ntraining: {updates: 8}\nobjective: {}\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path), str(grid)]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) > 9
    for line in lines:
        mode, is_folder, _ = line.split(maxsplit=2)
        assert int(mode, 8) == (0o775 if is_folder == "True" else 0o664), line
