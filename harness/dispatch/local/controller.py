"""The process behind `launch --on local`: works a run's queue off and ends.

Run as `python -m klab.harness.dispatch.local.controller RUN`.

It may be killed at any time: jobs go on without it, and the next launch starts another one, which adopts them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from klab.grid import UserError
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.local.pool import Pool
from klab.harness.dispatch.packing.step_times import HardwareKey
from klab.harness.store import Lock, LockHeld, Run, files

POLL_SECONDS = 0.2


def request_path(run: Run) -> Path:
    return run.jobs / "local-request.json"


def state_path(run: Run) -> Path:
    return run.jobs / "local-state.json"


def lock_path(run: Run) -> Path:
    return run.jobs / "controller"


def run_controller(run_path: str | Path) -> None:
    """Work off the queue of the run; returns at once when another controller does so already."""
    run = Run.open(run_path)
    lock = Lock(lock_path(run), purpose="local controller")
    try:
        with lock:
            _loop(run, lock)
    except LockHeld:
        return


def _loop(run: Run, lock: Lock) -> None:
    pool = Pool(run)
    pool.adopt()
    ticket: object = None
    while lock.is_ours():
        request = files.read_record(request_path(run)) or {}
        fresh = request.get("ticket") != ticket
        if fresh:
            ticket = request.get("ticket")
            _apply_request(pool, request)
        if pool.step() or fresh:
            _write_state(run, pool, ticket)
        if not pool.waiting and not pool.running and _try_to_end(run, lock, ticket):
            return
        time.sleep(POLL_SECONDS)


def _apply_request(pool: Pool, request: dict[str, Any]) -> None:
    pool.replace_queue(
        [Pack(tuple(cells)) for cells in request.get("packs", [])],
        slots=max(1, int(request.get("slots", 1))),
        threads=max(1, int(request.get("threads", 1))),
        processes=max(1, int(request.get("processes", 1))),
        gpus=[str(device) for device in request.get("gpus", [])],
        place=HardwareKey(**request["place"]) if request.get("place") else None,
    )


def _write_state(run: Run, pool: Pool, ticket: object) -> None:
    files.replace(
        state_path(run),
        files.encode_record(
            {
                "ticket": ticket,
                "waiting": [list(pack.cells) for pack in pool.waiting],
                "flying": [
                    {"cells": list(flight.cells), "job": flight.job.job_id if flight.job else flight.pid}
                    for flight in pool.running
                ],
            }
        ),
        durable=False,
    )


def _try_to_end(run: Run, lock: Lock, ticket: object) -> bool:
    """Whether the controller may end: no new request came in. Launchers write requests under the same lock."""
    try:
        with run.lock("ending the local controller", wait=5.0):
            request = files.read_record(request_path(run)) or {}
            if request.get("ticket") != ticket:
                return False
            lock.release()
            return True
    except LockHeld:
        return False


if __name__ == "__main__":
    try:
        run_controller(sys.argv[1])
    except UserError as error:
        sys.exit(str(error))
