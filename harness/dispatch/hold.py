"""Holding cells that wait, and releasing them: what is held stands in the run folder, and survives whoever held it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from klab.harness.dispatch.backends import Executor
from klab.harness.dispatch.status import State, executors_of, statuses
from klab.harness.store import Run

WAITING: tuple[State, ...] = ("waiting", "queued", "preempted", "lost")
"""States of cells that can be held."""


@dataclass(frozen=True, slots=True)
class Released:
    """Cells that were released: those that start by themselves, and those that wait for the next launch."""

    starting: tuple[str, ...]
    waiting: tuple[str, ...]


def hold(
    run: Run, cell_ids: Iterable[str], executors: Iterable[Executor] | None = None, why: str | None = None
) -> list[str]:
    """Hold those of the cells that wait; which these are. They do not start before `release`, however often the run is
    launched. A cell that runs goes on.

    The hold is recorded before anything else, and a worker reads the record once more when it has claimed a cell, so
    that no cell starts after this returned.

    Args:
        why: what `status` says of it; None: how to release it.

    Raises:
        UserError: Slurm does not answer. The holds are recorded all the same.
    """
    known = list(executors_of(run) if executors is None else executors)
    rows = [row for row in statuses(run, known, cell_ids) if row.state in WAITING]
    for row in rows:
        event = {"event": "held", "at": time.time(), "queue": row.executor}
        run.cell(row.id).append_attempt(event if why is None else {**event, "why": why})
    held = [row.id for row in rows]
    for executor in known if held else ():
        executor.hold(run, held)
    return held


def release(run: Run, cell_ids: Iterable[str], executors: Iterable[Executor] | None = None) -> Released:
    """Release those of the cells that are held, by klab or by Slurm's own hold of a user.

    A cell that was in the queue of the local pool returns to it, and the pool starts again where it has ended. A job
    that waits at Slurm is released. Other cells wait for the next launch.

    Raises:
        UserError: Slurm does not answer, or does not release a job.
    """
    known = list(executors_of(run) if executors is None else executors)
    with run.lock("releasing cells"):
        held = [row.id for row in statuses(run, known, cell_ids) if row.state == "held"]
        starting: set[str] = set()
        queues = {identity: (run.cell(identity).last_attempt() or {}) for identity in held}
        for identity in held:
            if queues[identity].get("event") == "held":
                event = {"event": "released", "at": time.time(), "queue": queues[identity].get("queue", "")}
                run.cell(identity).append_attempt(event)
        for executor in known if held else ():
            starting |= executor.release(run, held)
    return Released(
        tuple(each for each in held if each in starting), tuple(each for each in held if each not in starting)
    )
