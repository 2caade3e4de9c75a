"""`python -m klab.harness.engines.trl.shielded MODULE …`: a launcher on which a scheduler's signals have no effect.

Slurm sends the signals of preemption and time limits to all processes of a job. The process of the job turns them into
a request to stop, and the ranks go on until they have saved; torchrun would end its ranks at once, and end itself on a
signal that it does not know. What is ignored here stays so in the processes that it starts.
"""

from __future__ import annotations

import runpy
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers and terminals send. torchrun handles the signals of the variable `PET_SIGNALS_TO_HANDLE` itself."""


def ignore_signals() -> None:
    """Ignore `SIGNALS` in this process and in those that it starts."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    ignore_signals()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
