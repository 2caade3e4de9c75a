"""What a cell leaves behind: each update once, numbers bit by bit, one writer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from klab.grid import UserError
from klab.harness.store import CellFolder, ClaimRevoked, LockHeld, Run


@pytest.fixture
def folder(run: Run) -> CellFolder:
    return run.cell(run.cells[0])


def row(update: int) -> dict[str, object]:
    return {"update": update, "reward_mean": update / 3, "nonfinite": False}


def test_nothing_exists_before_something_is_written(folder: CellFolder) -> None:
    assert (folder.metrics(), folder.evaluations(), folder.attempts()) == ([], [], [])
    assert (folder.heartbeat(), folder.result(), folder.error(), folder.last_metrics()) == (None, None, None, None)
    assert not folder.path.exists()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats())
def test_numbers_keep_their_bits(folder: CellFolder, value: float) -> None:
    folder.truncate_metrics(0)
    folder.append_metrics([{"update": 1, "reward_mean": value}])
    found = folder.metrics()[0]["reward_mean"]
    assert found.hex() == value.hex() or (math.isnan(found) and math.isnan(value))


@pytest.mark.parametrize("through", [0, 2, 5, 9])
@pytest.mark.parametrize("torn", [b"", b'{"schema":1,"upd'])
def test_rows_after_the_checkpoint_are_dropped_and_recorded_once(folder: CellFolder, through: int, torn: bytes) -> None:
    folder.append_metrics(row(update) for update in range(1, 6))
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert folder.truncate_metrics(through) == min(through, 5)
    folder.append_metrics(row(update) for update in range(min(through, 5) + 1, 8))
    assert folder.metrics() == [row(update) for update in range(1, 8)]


def test_an_update_recorded_twice_is_a_mistake(folder: CellFolder) -> None:
    folder.append_metrics([row(1), row(2), row(2)])
    with pytest.raises(UserError, match=r"metrics\.jsonl line 3"):
        folder.metrics()


def test_a_damaged_row_names_its_file_and_line(folder: CellFolder) -> None:
    folder.append_metrics([row(1), row(2), row(3)])
    path = folder.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0.6666", b"0.7666"))
    for read in (folder.metrics, lambda: folder.truncate_metrics(1)):
        with pytest.raises(UserError, match=r"metrics\.jsonl line 2.*checksum"):
            read()
    assert folder.last_metrics() == row(3)


def test_the_result_is_the_last_word(folder: CellFolder) -> None:
    folder.record_failure("Traceback …\nValueError: no")
    assert folder.error() == "Traceback …\nValueError: no"
    folder.write_result({"state": "diverged", "updates": 3})
    assert folder.result() == {"state": "diverged", "updates": 3}
    assert folder.error() is None


def test_a_result_that_is_no_result_is_a_mistake(folder: CellFolder) -> None:
    with pytest.raises(ValueError, match="state"):
        folder.write_result({"state": "running"})
    folder.write_result({"state": "finished", "reward_final": 0.25})
    path = folder.path / "result.json"
    path.write_text(path.read_text().replace("0.25", "0.75"))
    with pytest.raises(UserError, match=r"result\.json"):
        folder.result()


def test_a_damaged_heartbeat_is_no_heartbeat(folder: CellFolder) -> None:
    folder.write_heartbeat({"update": 3})
    assert folder.heartbeat() is not None
    (folder.path / "heartbeat").write_text("???")
    assert folder.heartbeat() is None


def test_a_claim_admits_one_process_and_shows_who(folder: CellFolder, run: Run) -> None:
    folder.claim(details={"executor": "local"})
    try:
        with pytest.raises(LockHeld, match=str(os.getpid())):
            run.cell(folder.id).claim()
        claimed = folder.claim_holder()
        assert claimed is not None
        assert claimed["executor"] == "local"
    finally:
        folder.release_claim()
    assert folder.claim_holder() is None


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: folder.append_metrics([row(1)]),
        lambda folder: folder.append_evaluations([row(0)]),
        lambda folder: folder.truncate_metrics(0),
        lambda folder: folder.write_heartbeat({"update": 1}),
        lambda folder: folder.write_result({"state": "finished"}),
    ],
)
def test_an_evicted_process_writes_nothing(folder: CellFolder, run: Run, write: Callable[[CellFolder], None]) -> None:
    folder.claim()
    try:
        run.cell(folder.id).revoke()
        with pytest.raises(ClaimRevoked):
            write(run.cell(folder.id))
        folder.record_failure("too late")
    finally:
        folder.release_claim()
    assert sorted(path.name for path in folder.path.iterdir()) == ["cell.yaml"]


def test_a_claim_sweeps_up_after_a_killed_writer(folder: CellFolder) -> None:
    folder.write_heartbeat({"update": 1})
    (folder.path / ".heartbeat.0123456789ab.tmp").write_text("half")
    folder.claim()
    folder.release_claim()
    assert sorted(path.name for path in folder.path.iterdir()) == ["cell.yaml", "heartbeat"]


def test_a_full_disk_is_an_error_of_the_system(folder: CellFolder) -> None:
    folder.append_metrics([row(1)])
    path = folder.path / "metrics.jsonl"
    path.rename(folder.path / "kept")
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        folder.append_metrics([row(2)])
