"""A launcher that is killed at a chosen point: `python -m tests.slurm.dying_launcher POINT GRID RUNS`.

Points: `intent` (the intent is written, sbatch not called), `sbatch` (Slurm has the job, its pickles are not in place),
`id` (everything but the job's id is written down).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from submitit.core.utils import JobPaths

from klab.harness.cli.main import main
from klab.harness.dispatch.slurm import array_job as sbatch
from klab.harness.dispatch.slurm.submission import Submission


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str) -> None:
    """Lay the mine."""
    if point == "intent":
        sbatch.submit = die
    elif point == "sbatch":
        JobPaths.move_temporary_file = die  # type: ignore[method-assign]
    elif point == "id":
        write: Callable[[Submission], None] = Submission.write
        Submission.write = lambda self: die() if self.job else write(self)  # type: ignore[method-assign]


if __name__ == "__main__":
    arm(sys.argv[1])
    sys.exit(main(["launch", sys.argv[2], "--no-check", "--on", "slurm", "--runs", sys.argv[3]]))
