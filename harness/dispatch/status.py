"""The state of every cell, from the most reliable source that knows it: result, living worker, scheduler, attempts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from klab.grid import UserError
from klab.harness.dispatch.backends import Executor, JobSource, JobStatus
from klab.harness.dispatch.local.backend import LocalExecutor, abandoned_cells
from klab.harness.dispatch.local.queue_files import log_path
from klab.harness.dispatch.tuning import pending, stopped
from klab.harness.store import Run, Snapshot, scan
from klab.harness.store.error_text import explaining_line

State = Literal[
    "waiting",
    "queued",
    "held",
    "running",
    "preempted",
    "finished",
    "diverged",
    "stopped",
    "failed",
    "cancelled",
    "lost",
    "unknown",
]
STATES: tuple[State, ...] = (
    "finished",
    "stopped",
    "diverged",
    "running",
    "queued",
    "held",
    "waiting",
    "preempted",
    "unknown",
    "lost",
    "cancelled",
    "failed",
)
INTERRUPTIONS = ("TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE")
"""Slurm's states of jobs that ended for reasons outside of their cells: a launch continues these cells."""

FINAL_STATES: tuple[State, ...] = ("finished", "diverged", "stopped", "failed", "cancelled")
"""States that only a new launch changes."""


@dataclass(frozen=True, slots=True)
class CellStatus:
    """One line of the status table.

    Attributes:
        update, updates: optimizer updates done, and planned.
        reward: mean reward of the newest update; of a cell with a result, its final reward.
        detail: the scheduler's reason, the line of the error that explains it, or the host.
        seconds_left: until the time limit, where a scheduler reports it.
        since: seconds since the newest heartbeat, None where there was none.
    """

    id: str
    state: State
    update: int = 0
    updates: int = 0
    reward: float | None = None
    detail: str = ""
    executor: str = ""
    job: str = ""
    seconds_left: float | None = None
    since: float | None = None


def statuses(
    run: Run,
    executors: Iterable[JobSource] | None = None,
    cells: Iterable[str] | None = None,
    snapshots: Mapping[str, Snapshot] | None = None,
) -> list[CellStatus]:
    """The state of each cell, in the grid's order. A scheduler gets one query, and none when all cells have results.

    Cells of a second stage whose settings are not chosen yet stand at the end, under the names of their arms and seeds.

    Args:
        cells: the cells to tell of, without those that wait for their settings; None: all.
        snapshots: what the folders of the cells say, where somebody has looked; then nobody looks again.
    """
    if snapshots is None:
        run.refresh()
        snapshots = scan(run, cells)
    later = pending(run) if cells is None else {}
    jobs: dict[str, tuple[str, JobStatus]] = {}
    if later or any(each.result is None for each in snapshots.values()):
        for executor in executors_of(run) if executors is None else executors:
            jobs.update({identity: (executor.name, job) for identity, job in executor.states(run).items()})
    rows = [_status(run, each, *jobs.get(each.id, ("", None))) for each in snapshots.values()]
    if not later:
        return rows
    held = stopped(run)
    return rows + [_pending(name, later[name], name in held, *jobs.get(name, ("", None))) for name in later]


def count(rows: Iterable[CellStatus]) -> dict[State, int]:
    """How many cells are in each state, in the order of `STATES`, without empty ones."""
    found = Counter(row.state for row in rows)
    return {state: found[state] for state in STATES if found[state]}


def executors_of(run: Run) -> list[Executor]:
    """The executors that may have jobs of this run."""
    found: list[Executor] = [LocalExecutor()]
    if (run.jobs / "slurm").exists():
        from klab.harness.dispatch.slurm.backend import SlurmExecutor

        found.append(SlurmExecutor())
    return found


def controller_problem(run: Run, rows: Iterable[CellStatus]) -> str | None:
    """One sentence when the controller of the local pool is gone and cells still wait in its queue, else None.

    Args:
        rows: the run's `statuses`.
    """
    waiting = {row.id for row in rows if row.state in ("waiting", "lost") or (row.state == "preempted" and not row.job)}
    abandoned = waiting & abandoned_cells(run) if waiting else set()
    if not abandoned:
        return None
    cells = "1 cell" if len(abandoned) == 1 else f"{len(abandoned)} cells"
    return f"the controller ended with {cells} in its queue; see {log_path(run)}. Launch again to continue."


def _status(run: Run, snapshot: Snapshot, executor: str, job: JobStatus | None) -> CellStatus:
    updates = _updates(run.resolved(snapshot.id))
    if snapshot.problem is not None:
        return CellStatus(snapshot.id, "failed", updates=updates, detail=snapshot.problem)
    if snapshot.result is not None:
        return _from_result(snapshot, updates)
    claim, beat = snapshot.claim or {}, snapshot.heartbeat or {}
    state, detail = _state(run, snapshot, job)
    return CellStatus(
        snapshot.id,
        state,
        update=_whole(beat.get("update")),
        updates=updates,
        reward=_number(beat.get("reward")),
        detail=detail,
        executor=executor or str(claim.get("executor", "") if snapshot.alive else ""),
        job=job.job if job else str(claim.get("job", "") if snapshot.alive else ""),
        seconds_left=job.seconds_left if job else None,
        since=max(0.0, time.time() - beat["at"]) if _number(beat.get("at")) is not None else None,
    )


def _pending(name: str, resolved: Mapping[str, Any], held: bool, executor: str, job: JobStatus | None) -> CellStatus:
    """The line of a cell whose settings the first stage has still to choose."""
    state, detail = _from_scheduler(job, Snapshot(name)) if job is not None else ("waiting", "")
    if held:
        state, detail = "cancelled", ""
    elif state in ("waiting", "lost", "queued", "failed"):
        state, detail = "queued" if state == "queued" else "waiting", "waits for tuning"
    return CellStatus(
        name, state, updates=_updates(resolved), detail=detail, executor=executor, job=job.job if job else ""
    )


def _from_result(snapshot: Snapshot, updates: int) -> CellStatus:
    result = snapshot.result or {}
    ends: dict[object, State] = {"diverged": "diverged", "stopped": "stopped"}
    return CellStatus(
        snapshot.id,
        ends.get(result["state"], "finished"),
        update=_whole(result.get("updates")),
        updates=updates,
        reward=_number(result.get("reward_final")),
        detail=str(result.get("reason") or ""),
    )


def _state(run: Run, snapshot: Snapshot, job: JobStatus | None) -> tuple[State, str]:
    event = str((snapshot.event or {}).get("event", ""))
    if snapshot.alive:
        host = str((snapshot.claim or {}).get("host", ""))
        if snapshot.heartbeat is None or (snapshot.heartbeat.get("pid") != (snapshot.claim or {}).get("pid")):
            return "running", f"starting on {host}"
        return "running", f"on {host}"
    if event == "cancelled":
        return "cancelled", ""
    if snapshot.held:
        return "held", str((snapshot.event or {}).get("why") or f"release with: klab release {run.name} CELL")
    if snapshot.failed:
        try:
            return "failed", explaining_line(run.cell(snapshot.id).error() or "")
        except UserError as error:
            return "failed", str(error)
    if job is not None:
        return _from_scheduler(job, snapshot)
    if event == "started":
        return "lost", "worker process died without a result; relaunch to resume from the last checkpoint"
    if event == "ended" and (snapshot.event or {}).get("state") == "interrupted":
        return "preempted", "stopped with a checkpoint; relaunch to resume"
    return "waiting", ""


def _from_scheduler(job: JobStatus, snapshot: Snapshot) -> tuple[State, str]:
    if job.state == "preempted" and snapshot.event is not None:
        return "preempted", job.reason
    if job.state in ("queued", "preempted"):  # requeued before it ever started: it only waits
        return "queued", job.reason
    if job.state == "held":
        return "held", f"{job.reason or 'held'}; release with: scontrol release {job.job}"
    if job.state == "running":
        return "running", job.reason or "starting"
    if job.state == "unknown":
        return "unknown", job.reason or "no answer from the scheduler"
    if job.state == "cancelled":
        return "cancelled", job.reason
    if job.state == "failed" and job.reason in INTERRUPTIONS:
        return "lost", f"{job.reason}; relaunch to resume from the last checkpoint"
    if job.state == "failed":
        return "failed", _describe_failure(job)
    return ("lost" if snapshot.event is not None else "waiting"), job.reason


def _describe_failure(job: JobStatus) -> str:
    parts = [job.reason] if job.reason else []
    if job.signal:
        parts.append(f"signal {job.signal}")
    elif job.exit_code:
        parts.append(f"exit code {job.exit_code}")
    return ", ".join(parts) or "the job failed"


def _updates(resolved: Mapping[str, Any]) -> int:
    training = resolved.get("training")
    return _whole(training.get("updates")) if isinstance(training, Mapping) else 0


def _whole(value: object) -> int:
    return value if type(value) is int else 0


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
