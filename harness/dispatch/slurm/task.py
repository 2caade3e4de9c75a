"""The task of a Slurm job array: train cells through preemption, time limits and requeues.

submitit's answer to SIGUSR2 is to rewrite the job's pickle and to requeue, at whatever point of the program the signal
arrives, a limited number of times; and it ignores SIGTERM, which is all that most clusters send to a preempted job.
Here both set a flag; training stops and saves after the current update, and then the job asks Slurm what is going on:

* SIGUSR2 (time limit near, or preemption): requeue.
* SIGTERM: requeue if Slurm means to preempt, end if the job was cancelled, otherwise go on from the checkpoint.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from klab.harness.dispatch.gpus import let_segments_grow
from klab.harness.dispatch.job import StopSignal, run_job, sampling_engines
from klab.harness.dispatch.processes import follow_group, leading_group, select_gpu
from klab.harness.dispatch.slurm import client
from klab.harness.dispatch.threads import limit_threads
from klab.harness.store import Run
from klab.harness.training.distributed.network import own_address

if TYPE_CHECKING:
    from klab.harness.engines.trl.launcher import Ranks
    from klab.harness.training.distributed.process_group import ProcessGroup

MAX_REQUEUES = 1000
"""Requeues after which a job gives up: it would be requeued for ever without progress."""

REQUEUE_CODE = 85
"""Exit code that asks the job's script to requeue it, where this process cannot: in a container without scontrol."""

_ANSWER_SECONDS = 60.0
"""Seconds to wait for a controller that does not answer."""


@dataclass(frozen=True)
class ArrayTask:
    """The callable that submitit pickles: a run folder and the cells to train there.

    Attributes:
        threads: of each process.
        grace: seconds that the current update may take after a signal, before the job requeues without it.
        processes: tasks of the job, over all of its nodes, which train together.
        ranks: processes that a launcher starts on each node for TRL; a task is a node then. 0: there is no launcher.
    """

    run: str
    cells: tuple[str, ...]
    threads: int = 1
    grace: float = 40.0
    processes: int = 1
    ranks: int = 0

    def __call__(self) -> dict[str, str]:
        rank = int(os.environ.get("SLURM_PROCID", "0"))
        limit_threads(self.threads)
        if self.ranks:
            return self._with_launcher(rank)
        if self.processes > 1:
            select_gpu(int(os.environ.get("SLURM_LOCALID", "0")))
            let_segments_grow(sampling_engines(Run.open(self.run), self.cells))
        if rank:
            if rank < self.processes:
                follow_group(self.run, rank, self.processes, self.threads, _meeting())
            return {}
        signal.signal(signal.SIGUSR2, _requeue)  # what `StopSignal` falls back to; submitit's own until here
        if self.processes == 1:
            return self._lead()
        alone = os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1"
        address = None if alone else socket.gethostname()
        with leading_group(Run.open(self.run), self.processes, _meeting(), address) as world:
            return self._lead(world)

    def _with_launcher(self, node: int) -> dict[str, str]:
        """Train cells on TRL with processes of every node, of which this task is one."""
        from klab.harness.engines.trl.launcher import Ranks
        from klab.harness.engines.trl.together import dismiss, follow_ranks

        run = Run.open(self.run)
        launcher = run.resources.launcher
        ranks = Ranks(
            self.ranks,
            self.processes,
            node,
            _address() if self.processes > 1 and node == 0 else None,
            None if launcher is None else launcher.accelerate,
            None if self.processes == 1 else _meeting().with_suffix(".orders"),
        )
        if node:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN)
            follow_ranks(run, ranks)
            return {}
        signal.signal(signal.SIGUSR2, _requeue)
        try:
            return self._lead(ranks=ranks)
        finally:
            dismiss(ranks)

    def _lead(self, world: ProcessGroup | None = None, ranks: Ranks | None = None) -> dict[str, str]:
        while True:
            with StopSignal(grace=self.grace) as stop_signal:
                states = run_job(
                    self.run,
                    self.cells,
                    executor="slurm",
                    threads=self.threads,
                    stop=stop_signal.requested,
                    world=world,
                    ranks=ranks,
                )
            if "interrupted" not in states.values():
                return states
            stop_signal.requeue()
            if shutil.which("scontrol") is None:
                sys.exit(REQUEUE_CODE)
            what = _imminent_end()
            if what == "preempted":
                _requeue()
            elif what == "ended":
                sys.exit(128 + signal.SIGTERM)

    def checkpoint(self) -> Any:
        """submitit calls this when a signal comes before `__call__` does: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _address() -> str:
    """Where the other nodes of the job reach this one.

    Raises:
        SystemExit: it has no address.
    """
    try:
        return own_address()
    except OSError as error:
        sys.exit(f"klab: the other nodes cannot reach this one: {error.strerror}")


def _meeting() -> Path:
    """The file by which the processes of this attempt of the job find one another."""
    from submitit.core.job_environment import JobEnvironment

    life = os.environ.get("SLURM_RESTART_COUNT", "0")
    return Path(os.environ["SUBMITIT_FOLDER"]) / f"{JobEnvironment().job_id}_{life}.meeting"


def _imminent_end() -> str | None:
    """What Slurm is about to do with this job; None when it does not answer within `_ANSWER_SECONDS`."""
    job, name = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_JOB_NAME")
    deadline = time.monotonic() + _ANSWER_SECONDS
    while (found := client.imminent_end(job, name)) is None and time.monotonic() < deadline:
        time.sleep(2.0)
    return found


def _requeue(number: int = 0, frame: FrameType | None = None) -> None:
    """Put this job back into the queue and end. Returns where Slurm refuses: then it is better to go on."""
    job = os.environ["SLURM_JOB_ID"]
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= MAX_REQUEUES:
        sys.exit(f"klab: requeued {MAX_REQUEUES} times; giving up")
    if shutil.which("scontrol") is None:
        sys.exit(REQUEUE_CODE)
    deadline = time.monotonic() + _ANSWER_SECONDS
    while True:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if done.returncode == 0:
            print(f"klab: requeued job {job}", file=sys.stderr, flush=True)
            sys.exit(0)
        print(f"klab: could not requeue job {job}: {done.stderr.strip()}", file=sys.stderr, flush=True)
        if "Unable to contact" not in done.stderr or time.monotonic() > deadline:
            return
        time.sleep(2.0)


def write_missing_pickle(run: str, number: int) -> None:
    """Write this job's pickle, because its launcher died between `sbatch` and writing it."""
    from submitit.core.job_environment import JobEnvironment
    from submitit.core.utils import DelayedSubmission, JobPaths

    from klab.harness.dispatch.slurm.submission import folder, read

    path = folder(Run.open(run).jobs, number)
    submission = read(path)
    if submission is None:
        sys.exit(f"klab: {path} holds no submission")
    os.environ.setdefault("SUBMITIT_EXECUTOR", "slurm")
    environment = JobEnvironment()
    index = int(environment.array_task_id or 0)
    task = ArrayTask(
        run, submission.cells[index], submission.threads, processes=submission.processes, ranks=submission.ranks
    )
    delayed = DelayedSubmission(task)
    delayed.set_timeout(MAX_REQUEUES, MAX_REQUEUES)
    target = JobPaths(path, job_id=environment.job_id).submitted_pickle
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    delayed.dump(temporary)
    temporary.replace(target)


if __name__ == "__main__":
    write_missing_pickle(sys.argv[1], int(sys.argv[2]))
