"""Lock files that name their holder, work on network file systems, and are broken safely when the holder is dead.

A lock is a file made by `link` from a private temporary: atomic on NFS as well. Its holder touches it while it lives; a
lock is stale when its process is known to be dead, or, for another machine's process, when it was not touched for
`STALE_SECONDS`.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from klab.grid import UserError
from klab.harness.store.files import encode_record, read_record
from klab.harness.store.process import ProcessId

STALE_SECONDS = 120.0
REFRESH_SECONDS = 15.0
_BREAKING_SECONDS = 30.0
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class LockHeld(UserError):
    """Another process holds the lock."""

    def __init__(self, path: Path, holder: ProcessId | None, age: float, purpose: str) -> None:
        who = str(holder) if holder else "an unknown process"
        super().__init__(
            f"is held by {who} for {age:.0f} s{f' ({purpose})' if purpose else ''}",
            file=path,
            hint="Wait for it, or end that process; the lock of a dead process is removed automatically.",
        )
        self.holder = holder


class Lock:
    """A lock file. As a context manager it is refreshed in the background while held.

    Args:
        purpose: shown to those who wait.
        wait: seconds to wait for another holder.
        details: more entries of the record.
    """

    def __init__(
        self, path: Path, *, purpose: str = "", wait: float = 0.0, details: dict[str, Any] | None = None
    ) -> None:
        self.path = path
        self.purpose = purpose
        self.wait = wait
        self.details = details or {}
        self.token = secrets.token_hex(8)
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            LockHeld: when another process does not give it back within `wait` seconds.
        """
        deadline = time.monotonic() + self.wait
        while not self._link():
            record = read_lock(self.path)
            if record is None:
                continue
            if is_stale(self.path, record):
                _break_stale(self.path, record.get("token"))
            elif time.monotonic() >= deadline:
                holder = ProcessId.from_record(record)
                age = max(0.0, time.time() - holder.at) if holder else 0.0
                raise LockHeld(self.path, holder, age, str(record.get("purpose", "")))
            else:
                time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        self._released.set()
        if self.is_ours():
            self.path.unlink(missing_ok=True)

    def is_ours(self) -> bool:
        """Whether the file still carries this lock's token."""
        record = read_lock(self.path)
        return record is not None and record.get("token") == self.token

    def refresh(self) -> None:
        """Renew the time stamp that shows other machines that the holder lives."""
        with suppress(OSError):
            os.utime(self.path)

    def __enter__(self) -> Lock:
        self.acquire()
        self._released.clear()
        threading.Thread(target=self._keep_fresh, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _keep_fresh(self) -> None:
        while not self._released.wait(REFRESH_SECONDS):
            self.refresh()

    def _link(self) -> bool:
        record = {"token": self.token, "purpose": self.purpose, **self.details, **ProcessId.current().to_record()}
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}.tmp")
        data = encode_record(record)
        try:
            temporary.write_bytes(data)
            os.link(temporary, self.path)
        except FileExistsError:
            return os.stat(temporary).st_nlink == 2  # the first try's answer was lost on the network, not its effect
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create(self.path, data)
        finally:
            temporary.unlink(missing_ok=True)
        return True


def _create(path: Path, data: bytes) -> bool:
    """For file systems without hard links; a reader may see the file before its text, and then waits."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)
    return True


def read_lock(path: Path) -> dict[str, Any] | None:
    """What the holder wrote; None when the lock is free, {} when its file is unreadable."""
    try:
        return read_record(path)
    except UserError:
        return {}


def is_stale(path: Path, record: dict[str, Any], probe: bool = True) -> bool:
    """Whether a lock's holder is known to be dead, or on another machine and silent for `STALE_SECONDS`.

    Args:
        probe: the file server may be asked for its time, by a file that is there for a moment.
    """
    holder = ProcessId.from_record(record)
    alive = holder.is_alive() if holder else None
    return (not alive) if alive is not None else untouched_seconds(path, probe) > STALE_SECONDS


def untouched_seconds(path: Path, probe: bool = True) -> float:
    """Seconds since the file was last touched, on the file server's own clock where the folder can be written (and
    with `probe`, else on that of this machine)."""
    try:
        touched = path.stat().st_mtime
    except OSError:
        return 0.0
    return abs(
        (_clock(path.parent) if probe else time.time()) - touched
    )  # a time in the future is a clock that jumped: as old as it is far away


def _clock(folder: Path) -> float:
    probe = folder / f".clock.{secrets.token_hex(6)}.tmp"
    try:
        probe.touch(exist_ok=False)
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
    except OSError:
        return time.time()


def _break_stale(path: Path, token: object) -> None:
    """Remove the stale lock that carries `token`. One breaker at a time, so that nobody removes a successor's lock."""
    breaking = path.with_name(f"{path.name}.breaking")
    try:
        os.close(os.open(breaking, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        if untouched_seconds(breaking) > _BREAKING_SECONDS:
            breaking.unlink(missing_ok=True)
        else:
            time.sleep(0.01)
        return
    try:
        record = read_lock(path)
        if record is not None and record.get("token") == token and is_stale(path, record):
            path.unlink(missing_ok=True)
    finally:
        breaking.unlink(missing_ok=True)
