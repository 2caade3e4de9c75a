"""Looking again tells what looking anew tells, and reads only what changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from klab.harness.store import Run, files, scan
from klab.harness.store.watcher import RESULTS_AT_A_LOOK, Watcher


def settle(run: Run) -> None:
    """As if everything had been written a minute ago."""
    for path in [*run.path.rglob("*"), run.path]:
        os.utime(path, (time.time() - 60, time.time() - 60), follow_symlinks=False)


def listed(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in [folder, *folder.rglob("*")]}


def test_every_change_is_seen_at_the_next_look(run: Run) -> None:
    watcher = Watcher(Run.open(run.path, read_only=True))
    first, second, third, _ = run.cells
    assert watcher.look() == []
    steps: list[tuple[str, Callable[[], object]]] = [
        (first, lambda: run.cell(first).append_attempt({"event": "started", "at": time.time()})),
        (first, lambda: run.cell(first).claim(details={"executor": "here"})),
        (first, lambda: run.cell(first).write_heartbeat({"update": 1})),
        (first, lambda: run.cell(first).write_heartbeat({"update": 2})),
        (second, lambda: run.cell(second).record_failure("ValueError: no")),
        (second, lambda: run.cell(second).clear_failure()),
        (third, lambda: run.cell(third).append_attempt({"event": "cancelled", "at": time.time()})),
        (third, lambda: run.cell(third).append_attempt({"event": "relaunched", "at": time.time()})),
        (first, lambda: run.cell(first).write_result({"state": "finished", "updates": 8, "reward_final": 0.5})),
        (first, lambda: run.cell(first).release_claim()),
        (first, lambda: shutil.rmtree(run.cell(first).path)),
    ]
    for settled in (False, True):
        for cell, change in steps if not settled else steps[4:8]:
            change()
            if settled:
                settle(run)
            watcher.look()
            assert watcher.snapshots == scan(run), (cell, change)


def test_what_did_not_change_is_not_read_again(run: Run) -> None:
    done, failed, running, _ = run.cells
    run.cell(done).write_result({"state": "finished", "updates": 8})
    run.cell(failed).record_failure("ValueError: no")
    run.cell(running).claim(details={"executor": "here"})
    run.cell(running).write_heartbeat({"update": 1})
    settle(run)
    watcher = Watcher(Run.open(run.path, read_only=True))
    assert sorted(watcher.look()) == sorted([done, failed, running])
    assert watcher.look() == []
    for identity, name in ((failed, "error.txt"), (running, "heartbeat")):
        path = run.cell(identity).path / name
        path.write_bytes(b"damaged")  # in place: neither the folder nor the attempts change
    assert watcher.look() == []
    run.cell(failed).append_attempt({"event": "relaunched", "at": time.time()})
    assert watcher.look() == [failed]
    run.cell(running).release_claim()


def test_a_process_that_dies_is_seen_although_no_file_changes(run: Run) -> None:
    program = (
        "import sys, time\nfrom klab.harness.store import Run\nrun = Run.open(sys.argv[1])\n"
        "for cell in run.cells[:2]:\n    run.cell(cell).claim()\nprint('claimed', flush=True)\ntime.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(run.path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"claimed\n"
    settle(run)
    watcher = Watcher(Run.open(run.path, read_only=True))
    watcher.look()
    assert [watcher.snapshots[cell].alive for cell in run.cells] == [True, True, False, False]
    assert watcher.look() == []
    process.kill()
    process.wait()
    assert watcher.look() == run.cells[:2]
    assert not any(each.alive for each in watcher.snapshots.values())


def test_results_are_looked_at_again_in_turn(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    run = make_run(("seeds: 2", f"seeds: {RESULTS_AT_A_LOOK}"))
    for identity in run.cells:
        run.cell(identity).write_result({"state": "finished", "updates": 8})
    watcher = Watcher(Run.open(run.path, read_only=True))
    assert len(watcher.look()) == 2 * RESULTS_AT_A_LOOK
    assert not (run.path / "index.json").exists()
    for cell in (run.cells[3], run.cells[-3]):
        (run.cell(cell).path / "result.json").unlink()
    seen = watcher.look() + watcher.look()
    assert sorted(seen) == sorted([run.cells[3], run.cells[-3]])
    assert watcher.snapshots[run.cells[3]].result is None


def test_nothing_is_written_not_even_where_a_lock_is_another_machines(run: Run) -> None:
    held = run.cell(run.cells[0])
    held.claim()
    record = files.read_record(held.path / "claim") or {}
    files.replace(held.path / "claim", files.encode_record({**record, "machine": "elsewhere", "host": "elsewhere"}))
    (run.jobs).mkdir()
    files.replace(run.jobs / "controller", files.encode_record({**record, "machine": "elsewhere"}))
    from klab.harness.dispatch.status import statuses

    opened = Run.open(run.path, read_only=True)
    before = listed(run.path)
    watcher = Watcher(opened)
    watcher.look()
    watcher.look()
    assert watcher.snapshots[run.cells[0]].alive
    assert {row.state for row in statuses(opened)} == {"running", "waiting"}
    assert listed(run.path) == before
    held.revoke()


def test_a_link_in_place_of_a_cell_is_a_problem_of_that_cell(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run.path, other)
    run.cell(run.cells[1]).write_result({"state": "finished", "updates": 8})
    (other / "cells").mkdir()
    (other / "cells" / run.cells[1]).symlink_to(run.cell(run.cells[1]).path)
    watcher = Watcher(Run.open(other, read_only=True))
    assert watcher.look() == [run.cells[1]]
    assert "is a link" in str(watcher.snapshots[run.cells[1]].problem)
