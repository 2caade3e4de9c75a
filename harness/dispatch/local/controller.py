"""The background process behind `launch --on local`: it works through a run's queue and exits when that is empty.

Run as `python -m klab.harness.dispatch.local.controller RUN`.

It may be killed at any time: its jobs go on without it, `status` reports that it ended, and the next launch starts
another one, which adopts the running jobs.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from klab.grid import UserError
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.local.pool import Pool
from klab.harness.dispatch.local.queue_files import lock_path, read_request, state_path
from klab.harness.dispatch.packing.step_times import HardwareKey
from klab.harness.dispatch.tuning import settle
from klab.harness.store import Lock, LockHeld, Run, files

POLL_SECONDS = 0.2


def run_controller(run_path: str | Path, server: subprocess.Popen[bytes] | None = None) -> None:
    """Work through the run's queue; returns at once when another controller already does.

    Args:
        server: a fork server that was started before.
    """
    run = Run.open(run_path)
    lock = Lock(lock_path(run), purpose="local controller")
    try:
        with lock:
            _loop(run, lock, Pool(run, server=server))
    except LockHeld:
        return


def _loop(run: Run, lock: Lock, pool: Pool) -> None:
    pool.adopt()
    ticket: object = None
    while lock.is_ours():
        request = read_request(run)
        fresh = request.get("ticket") != ticket
        if fresh:
            ticket = request.get("ticket")
            _apply_request(pool, request)
        if pool.step() or fresh:
            _write_state(run, pool, ticket)
        if not pool.waiting and not pool.running:
            if _begin_second_stage(pool, ticket):
                _write_state(run, pool, ticket)
            elif _try_to_end(run, lock, ticket):
                return
        time.sleep(POLL_SECONDS)


def _apply_request(pool: Pool, request: dict[str, Any]) -> None:
    pool.replace_queue(
        [Pack(tuple(cells)) for cells in request.get("packs", [])],
        slots=max(1, int(request.get("slots", 1))),
        threads=max(1, int(request.get("threads", 1))),
        processes=max(1, int(request.get("processes", 1))),
        gpus=[str(device) for device in request.get("gpus", [])],
        hardware=HardwareKey(**request["place"]) if request.get("place") else None,
    )


def _write_state(run: Run, pool: Pool, ticket: object) -> None:
    record = {
        "ticket": ticket,
        "waiting": [list(pack.cells) for pack in pool.waiting],
        "flying": [
            {"cells": list(each.cells), "job": each.job.job_id if each.job else each.pid} for each in pool.running
        ],
    }
    files.replace(state_path(run), files.encode_record(record), durable=False)


def _begin_second_stage(pool: Pool, ticket: object) -> bool:
    """Queue the cells whose settings the first stage of a tuned run has chosen; whether there were any."""
    if pool.run.tuned is None:
        return False
    try:
        with pool.run.lock("choosing tuned settings", wait=5.0):
            request = read_request(pool.run)
            if request.get("ticket") != ticket:
                return False
            more = settle(pool.run)
            pool.extend_queue(more, request.get("cells_per_job"))
            return bool(more)
    except LockHeld:
        return False


def _try_to_end(run: Run, lock: Lock, ticket: object) -> bool:
    """Give the controller's lock back unless a new request came in; launches write requests under the run's lock."""
    try:
        with run.lock("ending the local controller", wait=5.0):
            if read_request(run).get("ticket") != ticket:
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
