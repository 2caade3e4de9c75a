"""Result before living worker before scheduler before lost; no answer is never a failure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from klab.grid import Grid
from klab.grid.schema.sections import Resources
from klab.harness.cli.progress import resting
from klab.harness.dispatch.backends import JobStatus, Pack
from klab.harness.dispatch.launch import should_submit
from klab.harness.dispatch.status import CellStatus, statuses
from klab.harness.store import CellFolder, Run


class Scheduler:
    """A backend that says one thing about every cell."""

    name = "slurm"

    def __init__(self, word: JobStatus | None) -> None:
        self.word = word
        self.asked = 0

    def submit(self, run: Run, packs: Sequence[Pack], resources: Resources) -> None:
        raise AssertionError("not called")

    def cancel(self, run: Run, cell_ids: Iterable[str]) -> None:
        raise AssertionError("not called")

    def hold(self, run: Run, cell_ids: Iterable[str]) -> None:
        raise AssertionError("not called")

    def release(self, run: Run, cell_ids: Iterable[str]) -> set[str]:
        raise AssertionError("not called")

    def states(self, run: Run) -> dict[str, JobStatus]:
        self.asked += 1
        return {} if self.word is None else dict.fromkeys(run.cells, self.word)


def untouched(folder: CellFolder) -> None:
    pass


def started(folder: CellFolder) -> None:
    folder.append_attempt({"event": "started", "at": time.time()})
    folder.write_heartbeat({"update": 3, "updates": 4, "reward": 0.5})


def interrupted(folder: CellFolder) -> None:
    started(folder)
    folder.append_attempt({"event": "ended", "at": time.time(), "state": "interrupted"})


def cancelled(folder: CellFolder) -> None:
    started(folder)
    folder.append_attempt({"event": "cancelled", "at": time.time()})


def failed(folder: CellFolder) -> None:
    started(folder)
    folder.record_failure("Traceback\n  …\nValueError: no such thing\n")


def finished(folder: CellFolder) -> None:
    failed(folder)
    folder.write_result({"state": "finished", "updates": 4, "reward_final": 0.75})


def diverged(folder: CellFolder) -> None:
    folder.write_result({"state": "diverged", "updates": 2})


QUEUED = JobStatus("queued", "12_3", "Resources")
RUNNING = JobStatus("running", "12_3", seconds_left=90.0)
SILENT = JobStatus("unknown", "12_3")
KILLED = JobStatus("failed", "12_3", "OUT_OF_MEMORY", signal=9)
HELD = JobStatus("held", "12_3", "JobHeldUser")
ENDED = JobStatus("ended", "12_3", "COMPLETED", exit_code=0)


@pytest.mark.parametrize(
    ("history", "word", "state"),
    [
        (untouched, None, "waiting"),
        (untouched, QUEUED, "queued"),
        (untouched, JobStatus("preempted", "12_3", "BeginTime"), "queued"),  # requeued before it ever started
        (untouched, HELD, "held"),
        (started, HELD, "held"),
        (untouched, RUNNING, "running"),
        (untouched, SILENT, "unknown"),
        (untouched, ENDED, "waiting"),
        (untouched, KILLED, "failed"),
        (started, None, "lost"),
        (started, QUEUED, "queued"),
        (started, JobStatus("preempted", "12_3", "BeginTime"), "preempted"),
        (started, RUNNING, "running"),
        (started, SILENT, "unknown"),
        (started, KILLED, "failed"),
        (started, JobStatus("failed", "12_3", "NODE_FAIL"), "lost"),
        (started, JobStatus("failed", "12_3", "TIMEOUT", exit_code=1), "lost"),
        (started, ENDED, "lost"),
        (interrupted, None, "preempted"),
        (interrupted, QUEUED, "queued"),
        (cancelled, None, "cancelled"),
        (cancelled, SILENT, "cancelled"),
        (failed, None, "failed"),
        (failed, SILENT, "failed"),
        (finished, KILLED, "finished"),
        (diverged, None, "diverged"),
    ],
)
def test_the_best_witness_decides(
    make_grid: Callable[..., Grid],
    place: Path,
    history: Callable[[CellFolder], None],
    word: JobStatus | None,
    state: str,
) -> None:
    run = Run.create(place / "run", make_grid())
    history(run.cell(run.cells[0]))
    (row,) = statuses(run, [Scheduler(word)])
    assert row.state == state


def test_a_living_worker_needs_no_scheduler(make_grid: Callable[..., Grid], place: Path) -> None:
    run = Run.create(place / "run", make_grid(seeds=2))
    folder = run.cell(run.cells[0])
    folder.claim(details={"executor": "slurm", "job": "12_3"})
    try:
        started(folder)
        rows = statuses(run, [Scheduler(KILLED)])
    finally:
        folder.release_claim()
    assert (rows[0].state, rows[0].update, rows[0].updates, rows[0].reward) == ("running", 3, 4, 0.5)
    assert rows[1].detail == "OUT_OF_MEMORY, signal 9"


def test_schedulers_are_asked_once_and_only_about_open_cells(make_grid: Callable[..., Grid], place: Path) -> None:
    run = Run.create(place / "run", make_grid(seeds=3))
    scheduler = Scheduler(QUEUED)
    statuses(run, [scheduler])
    assert scheduler.asked == 1
    for identity in run.cells:
        finished(run.cell(identity))
    statuses(run, [scheduler])
    assert scheduler.asked == 1


WRAPPED = """Traceback (most recent call last):
  File "a.py", line 1, in <module>
    load()
KeyError: 'x'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 2, in load
    raise OutOfMemoryError(
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.
GPU 0 has a total capacity of 79 GiB.
See the documentation of memory management
"""


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("Traceback\n  …\nValueError: no such thing\n", "ValueError: no such thing"),
        (WRAPPED, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."),
        ("grid.yaml: wrong weight\nChoose another one.", "grid.yaml: wrong weight"),
        ("", ""),
    ],
)
def test_a_failed_cell_shows_the_line_that_explains(
    make_grid: Callable[..., Grid], place: Path, error: str, shown: str
) -> None:
    run = Run.create(place / "run", make_grid())
    run.cell(run.cells[0]).record_failure(error)
    assert statuses(run, [])[0].detail == shown


def test_a_held_job_names_the_command_that_releases_it(make_grid: Callable[..., Grid], place: Path) -> None:
    run = Run.create(place / "run", make_grid())
    (row,) = statuses(run, [Scheduler(HELD)])
    assert row.detail == "JobHeldUser; release with: scontrol release 12_3"
    assert row.job == "12_3"
    assert resting([row])
    assert not should_submit(row, "slurm", retry_failed=True)


@pytest.mark.parametrize(
    ("state", "executor", "job", "retry", "taken"),
    [
        ("waiting", "", "", False, True),
        ("lost", "", "", False, True),
        ("cancelled", "", "", False, True),
        ("preempted", "", "", False, True),
        ("preempted", "slurm", "12_3", False, False),
        ("queued", "slurm", "12_3", False, False),
        ("queued", "local", "", False, True),
        ("queued", "local", "4711", False, False),
        ("running", "", "", True, False),
        ("unknown", "slurm", "12_3", True, False),
        ("finished", "", "", True, False),
        ("diverged", "", "", True, False),
        ("failed", "", "", False, False),
        ("failed", "", "", True, True),
    ],
)
def test_what_a_launch_takes_up(state: str, executor: str, job: str, retry: bool, taken: bool) -> None:
    row = CellStatus("cell", state, executor=executor, job=job)  # type: ignore[arg-type]
    assert should_submit(row, "local", retry) is taken
