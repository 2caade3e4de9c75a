"""The files through which launches and the controller of the local pool talk to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from klab.harness.store import Run, files
from klab.harness.store.lock import is_stale, read_lock

LOG = "controller.log"


def request_path(run: Run) -> Path:
    """What the newest launch asks for: packs, slots, threads, GPUs, and a `ticket` that names the request."""
    return run.jobs / "local-request.json"


def state_path(run: Run) -> Path:
    """What the controller is doing: the ticket of the request it works on, waiting packs and started jobs."""
    return run.jobs / "local-state.json"


def lock_path(run: Run) -> Path:
    """Held by the controller while it lives."""
    return run.jobs / "controller"


def log_path(run: Run) -> Path:
    """What controllers printed; empty as long as nothing went wrong."""
    return run.jobs / LOG


def read_request(run: Run) -> dict[str, Any]:
    """The newest request, {} before the first.

    Raises:
        UserError: when the file is damaged.
    """
    return files.read_record(request_path(run)) or {}


def read_state(run: Run) -> dict[str, Any]:
    """What the controller wrote last, {} before that.

    Raises:
        UserError: when the file is damaged.
    """
    return files.read_record(state_path(run)) or {}


def controller_is_alive(run: Run) -> bool:
    """Whether some controller works on this run's queue."""
    record = read_lock(lock_path(run))
    return record is not None and not is_stale(lock_path(run), record, probe=not run.read_only)
