"""Identity of a process: host, boot, number and start time, so that a reused process number is told apart."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process on a machine.

    `machine` is the boot id and the process namespace where the system tells them: process numbers mean something only
    inside it. `start` is the process's start in clock ticks since boot, so that clock changes and reused numbers do not
    matter. `at` is the wall clock (seconds since 1970) when the holder wrote itself down.
    """

    host: str
    machine: str
    pid: int
    start: float
    at: float

    @classmethod
    def current(cls) -> ProcessId:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _start(pid) or 0.0, time.time())

    @classmethod
    def of_pid(cls, pid: int) -> ProcessId | None:
        """A process of this machine, None where it does not run any more."""
        start = _start(pid)
        return None if start is None else cls(socket.gethostname(), _machine(), pid, start, time.time())

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ProcessId | None:
        """The holder in a stored record, None when it does not name one."""
        host, machine, pid, start, at = (record.get(key) for key in ("host", "machine", "pid", "start", "at"))
        if not isinstance(host, str) or not isinstance(machine, str) or type(pid) is not int:
            return None
        if not isinstance(start, int | float) or not isinstance(at, int | float):
            return None
        return cls(host, machine, pid, float(start), float(at))

    def to_record(self) -> dict[str, Any]:
        return asdict(self)

    def is_alive(self) -> bool | None:
        """Whether the process still runs; None when it is on a machine that cannot be looked at from here."""
        if self.machine != _machine() or self.pid <= 0:
            return None if self.pid > 0 else False
        return _start(self.pid) == self.start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _start(pid: int) -> float | None:
    """Start of a running process, None when there is none (a zombie does not run)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self/stat").exists() else _start_elsewhere(pid)
    except OSError:
        return None
    fields = text[text.rfind(")") + 2 :].split()
    return None if fields[0] in "ZX" else float(fields[19])


def _start_elsewhere(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


@lru_cache(maxsize=1)
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = socket.gethostname()
    try:
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        namespace = "0"
    return f"{boot}:{namespace}"
