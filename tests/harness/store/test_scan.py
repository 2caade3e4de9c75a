"""The quick look at all cells tells what the slow one tells."""

from __future__ import annotations

import os
import time
from pathlib import Path

from harness.store import Run, files, scan


def test_each_kind_of_cell_is_seen(run: Run) -> None:
    finished, failed, claimed, untouched = run.cells
    run.cell(finished).finish({"state": "finished", "updates": 8, "reward_final": 0.5, "parts": {"long": 1}})
    run.cell(failed).fail("ValueError: no")
    run.cell(claimed).claim(details={"executor": "here"})
    run.cell(claimed).append_attempt({"event": "started", "at": time.time()})
    run.cell(claimed).beat({"update": 4})
    try:
        found = scan(run)
    finally:
        run.cell(claimed).unclaim()
    assert found[finished].result == {"state": "finished", "updates": 8, "reward_final": 0.5}
    assert found[failed].failed
    assert found[claimed].alive
    assert (found[claimed].event or {})["event"] == "started"
    assert (found[claimed].heartbeat or {})["update"] == 4
    assert found[untouched] == type(found[untouched])(untouched)
    assert list(found) == run.cells


def test_a_damaged_result_is_a_problem_of_that_cell_only(run: Run) -> None:
    for identity in run.cells:
        run.cell(identity).finish({"state": "finished", "updates": 8})
    (run.path / "cells" / run.cells[0] / "result.json").write_text("{}")
    found = scan(run)
    assert "result.json" in str(found[run.cells[0]].problem)
    assert all(found[identity].result for identity in run.cells[1:])


def test_the_index_is_not_believed_where_results_changed(make_run: object, tmp_path: Path) -> None:
    run = make_run(("seeds: 2", "seeds: 30"))  # type: ignore[operator]
    for identity in run.cells:
        run.cell(identity).finish({"state": "finished", "updates": 8})
    first = scan(run)
    assert (run.path / "index.json").exists()
    assert scan(Run.open(run.path)) == first
    changed = run.cells[5]
    result = run.path / "cells" / changed / "result.json"
    result.write_bytes(files.seal({"state": "diverged", "updates": 2}, indent=2))
    os.utime(result, (1e9, 1e9))
    again = scan(run)
    assert again[changed].result == {"state": "diverged", "updates": 2}
    (run.path / "index.json").write_bytes(os.urandom(200))
    assert scan(run) == again
