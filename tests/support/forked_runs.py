"""One life of a run's cells in a forked process: it starts within milliseconds, so it can be killed hundreds of times.

The parent never trains itself: autograd's threads do not survive a fork.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import klab.harness.training.runner  # noqa: F401 - imported once, before the forks
from klab.harness.dispatch.job import run_job
from klab.harness.store import Run


def live(run: Run, before: Callable[[], object] | None = None) -> int:
    """Start a life of all cells and return its process number. `before` runs first, in the new process."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the process ends by _exit
        cells = tuple(run.cells)
        if before is not None:
            before()
        states = run_job(run.path, cells, executor="here")
        code = (
            0 if all(states.get(cell) in ("finished", "diverged") or run.cell(cell).result() for cell in cells) else 2
        )
    except BaseException:
        traceback.print_exc()
        code = 3
    finally:
        os._exit(code)


def wait(pid: int, seconds: float | None = None) -> int:
    """The exit code of a life, negative for a signal. After `seconds` it is killed."""
    if seconds is not None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
