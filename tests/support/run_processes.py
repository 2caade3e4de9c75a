"""The processes of a run: found by the locks they hold."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from klab.grid import UserError
from klab.harness.dispatch.local.queue_files import lock_path
from klab.harness.store import ProcessId, Run, scan
from klab.harness.store.lock import read_lock


def controllers(run: Run) -> list[int]:
    """The process that works the run's local queue off, if one lives."""
    holder = ProcessId.from_record(read_lock(lock_path(run)) or {})
    return [holder.pid] if holder is not None and holder.is_alive() else []


def workers(run: Run) -> list[int]:
    """The living processes that hold cells."""
    holders = (ProcessId.from_record(snapshot.claim or {}) for snapshot in scan(run).values())
    return sorted({holder.pid for holder in holders if holder is not None and holder.is_alive()} - {os.getpid()})


def followers(run: Run) -> list[int]:
    """The living processes that train with those that hold cells."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"klab.harness.dispatch.processes" in words and str(run.path).encode() in words:
                found.append(int(entry.name))
    return sorted(found)


def wait_for(condition: Callable[[], Any], seconds: float = 600.0) -> Any:
    """The condition's first true value; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("nothing happened in time")


def kill(*pids: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to processes, some of which may be gone already."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def end_all(folder: Path) -> None:
    """Kill whatever works on the runs in a folder: first what would start more."""
    for manifest in folder.glob("**/manifest.json"):
        try:
            run = Run.open(manifest.parent)
        except UserError:  # a test damaged it
            continue
        kill(*controllers(run))
        kill(*workers(run))
