"""Processes as /proc shows them: who lives, what descends from whom."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path


def processes() -> Iterator[int]:
    """Process numbers of the machine."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def living(pid: int) -> bool:
    """Whether the process runs; a zombie does not (the init of a container may reap late or never)."""
    return re.search(rb"^State:\s*[^ZX\s]", facts(pid, "status"), re.MULTILINE) is not None


def descendants(pid: int) -> set[int]:
    """The process and everything it started."""
    children: dict[int, list[int]] = {}
    for other in processes():
        parent = re.search(rb"^PPid:\s*(\d+)", facts(other, "status"), re.MULTILINE)
        if parent:
            children.setdefault(int(parent[1]), []).append(other)
    family, todo = set(), [pid]
    while todo:
        current = todo.pop()
        family.add(current)
        todo += children.get(current, [])
    return family


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal a process that may be gone already."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def facts(pid: int, name: str) -> bytes:
    """A file of /proc/PID; b"" when the process is gone or not ours to look at."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def wait_for(what: str, done: Callable[[], bool], seconds: float) -> None:
    """Wait until `done()`.

    Raises:
        TimeoutError: after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.05)
