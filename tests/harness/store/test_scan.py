"""The quick look at all cells tells what the slow one tells."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from klab.harness.store import Run, files, scan


def test_each_kind_of_cell_is_seen(run: Run) -> None:
    finished, failed, claimed, untouched = run.cells
    run.cell(finished).write_result({"state": "finished", "updates": 8, "reward_final": 0.5, "parts": {"long": 1}})
    run.cell(failed).record_failure("ValueError: no")
    run.cell(claimed).claim(details={"executor": "here"})
    run.cell(claimed).append_attempt({"event": "started", "at": time.time()})
    run.cell(claimed).write_heartbeat({"update": 4})
    try:
        found = scan(run)
    finally:
        run.cell(claimed).release_claim()
    assert found[finished].result == {"state": "finished", "updates": 8, "reward_final": 0.5}
    assert found[failed].failed
    assert found[claimed].alive
    assert (found[claimed].event or {})["event"] == "started"
    assert (found[claimed].heartbeat or {})["update"] == 4
    assert found[untouched] == type(found[untouched])(untouched)
    assert list(found) == run.cells


def test_a_damaged_result_is_a_problem_of_that_cell_only(run: Run) -> None:
    for identity in run.cells:
        run.cell(identity).write_result({"state": "finished", "updates": 8})
    (run.path / "cells" / run.cells[0] / "result.json").write_text("{}")
    found = scan(run)
    assert "result.json" in str(found[run.cells[0]].problem)
    assert all(found[identity].result for identity in run.cells[1:])


def test_the_index_is_not_believed_where_results_changed(make_run: object, tmp_path: Path) -> None:
    run = make_run(("seeds: 2", "seeds: 30"))  # type: ignore[operator]
    for identity in run.cells:
        run.cell(identity).write_result({"state": "finished", "updates": 8})
    first = scan(run)
    assert (run.path / "index.json").exists()
    assert scan(Run.open(run.path)) == first
    changed = run.cells[5]
    result = run.path / "cells" / changed / "result.json"
    result.write_bytes(files.encode_record({"state": "diverged", "updates": 2}, indent=2))
    os.utime(result, (1e9, 1e9))
    again = scan(run)
    assert again[changed].result == {"state": "diverged", "updates": 2}
    (run.path / "index.json").write_bytes(os.urandom(200))
    assert scan(run) == again


@pytest.fixture
def ended(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of 52 finished cells that was looked at once; written without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    run = make_run(("seeds: 2", "seeds: 26"))
    for identity in run.cells:
        run.cell(identity).write_result({"state": "finished", "updates": 8, "reward_final": 0.5})
    scan(run)
    return run


def test_results_that_nobody_touched_come_from_the_index(ended: Run) -> None:
    index = files.read_record(ended.path / "index.json")
    assert index is not None
    told = ended.cells[7]
    index["results"][told][1]["reward_final"] = 0.25
    files.replace(ended.path / "index.json", files.encode_record(index))
    assert {identity for identity, each in scan(ended).items() if (each.result or {})["reward_final"] == 0.25} == {told}


def test_a_result_of_the_same_size_and_time_is_read_again(ended: Run) -> None:
    for identity, write in zip(ended.cells, (Path.write_bytes, files.replace), strict=False):
        path = ended.cell(identity).path / "result.json"
        before = path.stat()
        write(path, path.read_bytes().replace(b"0.5", b"0.7"))  # damaged, hence a problem as soon as it is read
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
    problems = {identity: each.problem for identity, each in scan(ended).items() if each.problem}
    assert list(problems) == ended.cells[:2]


def test_a_cell_that_is_opened_again_is_seen_beside_the_index(ended: Run) -> None:
    again = ended.cell(ended.cells[3])
    (again.path / "result.json").unlink()
    again.claim(details={"executor": "here"})
    again.write_heartbeat({"update": 2})
    try:
        running = scan(ended)[again.id]
    finally:
        again.release_claim()
    assert (running.result, running.alive, (running.heartbeat or {})["update"]) == (None, True, 2)
    again.write_result({"state": "diverged", "updates": 3})
    assert scan(ended)[again.id].result == {"state": "diverged", "updates": 3}


def test_any_part_of_an_index_is_no_index(ended: Run) -> None:
    whole, truth = (ended.path / "index.json").read_bytes(), scan(ended)
    for share in range(20):
        (ended.path / "index.json").write_bytes(whole[: len(whole) * share // 20])
        assert scan(ended) == truth


def test_looking_at_a_run_needs_no_grid_file() -> None:
    """What validates grid files takes longer to import than ten thousand cells take to be looked at."""
    program = "import sys, klab.harness.store; print([name for name in ('pydantic', 'yaml') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
