"""The state of every cell, from the best witness there is: result > living worker > scheduler > lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from klab.harness.dispatch.backends import Executor, JobStatus
from klab.harness.store import Run, Snapshot, scan

State = Literal[
    "waiting", "queued", "running", "preempted", "finished", "diverged", "failed", "cancelled", "lost", "unknown"
]
STATES: tuple[State, ...] = (
    "finished",
    "diverged",
    "running",
    "queued",
    "waiting",
    "preempted",
    "unknown",
    "lost",
    "cancelled",
    "failed",
)
INTERRUPTIONS = ("TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE")
"""Ends of a job that say nothing about its cells: a launch takes them up again."""

FINAL_STATES: tuple[State, ...] = ("finished", "diverged", "failed", "cancelled")
"""States that nothing but a new launch changes."""


@dataclass(frozen=True, slots=True)
class CellStatus:
    """One line of the status table.

    Attributes:
        update, updates: optimizer updates done, and all.
        reward: the mean reward of the newest update, or of the last tenth for a cell with a result.
        detail: the scheduler's reason, the error's last line, the host.
        seconds_left: of the time limit, where a scheduler says so.
        since: seconds since the newest sign of life, None where there was none.
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
    run: Run, executors: Iterable[Executor] | None = None, cells: Iterable[str] | None = None
) -> list[CellStatus]:
    """The state of each cell, in the grid's order; every scheduler is asked at most once, and only about open cells."""
    snapshots = scan(run, cells)
    jobs: dict[str, tuple[str, JobStatus]] = {}
    if any(each.result is None for each in snapshots.values()):
        for executor in executors_of(run) if executors is None else executors:
            jobs.update({identity: (executor.name, job) for identity, job in executor.states(run).items()})
    return [_status(run, each, *jobs.get(each.id, ("", None))) for each in snapshots.values()]


def count(rows: Iterable[CellStatus]) -> dict[State, int]:
    """How many cells are in each state, in the order of `STATES`, without empty ones."""
    found = Counter(row.state for row in rows)
    return {state: found[state] for state in STATES if found[state]}


def executors_of(run: Run) -> list[Executor]:
    """The backends that have something to say about this run."""
    from klab.harness.dispatch.local.backend import LocalExecutor

    found: list[Executor] = [LocalExecutor()]
    if (run.jobs / "slurm").exists():
        from klab.harness.dispatch.slurm.backend import SlurmExecutor

        found.append(SlurmExecutor())
    return found


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


def _from_result(snapshot: Snapshot, updates: int) -> CellStatus:
    result = snapshot.result or {}
    return CellStatus(
        snapshot.id,
        "diverged" if result["state"] == "diverged" else "finished",
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
    if snapshot.failed:
        return "failed", last_line(run.cell(snapshot.id).error() or "")
    if job is not None:
        return _from_scheduler(job, snapshot)
    if event == "started":
        return "lost", "its process is gone without a word; launch again to continue from the last checkpoint"
    if event == "ended" and (snapshot.event or {}).get("state") == "interrupted":
        return "preempted", "stopped with a checkpoint; launch again to continue"
    return "waiting", ""


def _from_scheduler(job: JobStatus, snapshot: Snapshot) -> tuple[State, str]:
    if job.state in ("queued", "preempted"):
        begun = snapshot.event is not None and job.state == "preempted"
        return ("preempted" if begun else "queued"), job.reason
    if job.state == "running":
        return "running", job.reason or "starting"
    if job.state == "unknown":
        return "unknown", job.reason or "the scheduler does not answer"
    if job.state == "cancelled":
        return "cancelled", job.reason
    if job.state == "failed" and job.reason in INTERRUPTIONS:
        return "lost", f"{job.reason}; launch again to continue from the last checkpoint"
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


def last_line(text: str) -> str:
    """The line of a traceback that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _updates(resolved: Mapping[str, Any]) -> int:
    training = resolved.get("training")
    return _whole(training.get("updates")) if isinstance(training, Mapping) else 0


def _whole(value: object) -> int:
    return value if type(value) is int else 0


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
