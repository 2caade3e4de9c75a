"""One holder at a time; the dead are noticed, the living are named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from klab.harness.store import Lock, LockHeld, ProcessId, files
from klab.harness.store.lock import STALE_SECONDS, read_lock
from tests.support.run_processes import wait_for


def python(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def test_contending_processes_never_hold_it_together(tmp_path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from klab.harness.store import Lock
        folder = Path(sys.argv[1])
        for _ in range(25):
            with Lock(folder / "lock", wait=600):
                count = int((folder / "count").read_text())
                (folder / "count").write_text(str(count + 1))
    """
    (tmp_path / "count").write_text("0")
    workers = [python(program, tmp_path) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "75"
    assert not (tmp_path / "lock").exists()


def test_contenders_for_a_dead_holders_lock_never_hold_it_together(tmp_path: Path) -> None:
    """Every holder dies with the lock in hand; each successor must break exactly its predecessor's lock."""
    program = """
        import os, sys
        from pathlib import Path
        from klab.harness.store import Lock
        folder = Path(sys.argv[1])
        while True:
            Lock(folder / "lock", wait=600).acquire()
            count = int((folder / "count").read_text())
            (folder / "count").write_text(str(count + 1))
            if os.fork():
                os._exit(0)
            os.setsid()
            if count >= 30:
                os._exit(0)
    """
    (tmp_path / "count").write_text("0")
    workers = [python(program, tmp_path) for _ in range(3)]
    for worker in workers:
        worker.wait()
    wait_for(lambda: int((tmp_path / "count").read_text() or 0) >= 31)
    assert 31 <= int((tmp_path / "count").read_text()) <= 33


def test_a_living_holder_is_named_with_its_age(tmp_path: Path) -> None:
    with Lock(tmp_path / "lock", purpose="launching"), pytest.raises(LockHeld, match=r"launching") as caught:
        Lock(tmp_path / "lock").acquire()
    assert f"process {os.getpid()}" in str(caught.value)
    Lock(tmp_path / "lock").acquire()


def test_a_killed_holders_lock_is_taken_over_at_once(tmp_path: Path) -> None:
    holder = python(
        """
        import sys, time
        from pathlib import Path
        from klab.harness.store import Lock
        Lock(Path(sys.argv[1])).acquire()
        print("held", flush=True)
        time.sleep(60)
        """,
        tmp_path / "lock",
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(LockHeld):
        Lock(tmp_path / "lock").acquire()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = Lock(tmp_path / "lock")
    lock.acquire()
    assert lock.is_ours()


def test_a_reused_process_number_is_not_the_holder() -> None:
    me = ProcessId.current()
    assert me.is_alive()
    earlier = ProcessId(me.host, me.machine, me.pid, me.start - 100, me.at)
    assert earlier.is_alive() is False


def elsewhere(path: Path) -> None:
    """A lock as a process on another machine leaves it."""
    record = {"token": "t", "purpose": "training", "host": "n7", "machine": "other", "pid": 17, "start": 5, "at": 1e9}
    path.write_bytes(files.encode_record(record))


def test_another_machines_lock_holds_while_it_is_touched(tmp_path: Path) -> None:
    elsewhere(tmp_path / "lock")
    with pytest.raises(LockHeld, match="process 17 on n7"):
        Lock(tmp_path / "lock").acquire()


@pytest.mark.parametrize("jump", [-1.0, 1.0])
def test_another_machines_untouched_lock_is_stale_whatever_its_clock_says(tmp_path: Path, jump: float) -> None:
    elsewhere(tmp_path / "lock")
    then = time.time() + jump * (STALE_SECONDS + 5)
    os.utime(tmp_path / "lock", (then, then))
    lock = Lock(tmp_path / "lock")
    lock.acquire()
    assert lock.is_ours()


def test_releasing_does_not_take_a_successors_lock(tmp_path: Path) -> None:
    first = Lock(tmp_path / "lock")
    first.acquire()
    (tmp_path / "lock").unlink()
    second = Lock(tmp_path / "lock")
    second.acquire()
    first.release()
    assert second.is_ours()


def test_an_unreadable_lock_is_waited_for_then_broken(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("{")
    with pytest.raises(LockHeld, match="unknown process"):
        Lock(tmp_path / "lock").acquire()
    os.utime(tmp_path / "lock", (1e9, 1e9))
    Lock(tmp_path / "lock").acquire()
    assert read_lock(tmp_path / "lock")


def test_a_waiting_process_gets_the_lock_when_it_is_released(tmp_path: Path) -> None:
    held = Lock(tmp_path / "lock")
    held.acquire()
    threading.Timer(0.2, held.release).start()
    with Lock(tmp_path / "lock", wait=600) as lock:
        assert lock.is_ours()
