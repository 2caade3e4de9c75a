"""A fork server for jobs of the local pool: it imports torch and klab once and forks a process per job.

As a program this module imports, transformers too where it is given its name. Then it reads submitit folders from
standard input, one line each, forks for each a process that runs the job pickled there, and answers its process number.
It makes no tensor, starts no thread and never initialises CUDA, so that a fork may use as many threads and whatever
device it was given. It ends when its standard input does; its forks go on.

`multiprocessing`'s forkserver does less here: it reports how a child ended through the server, so that all running jobs
count as ended when the server is killed; a parent waits for its children when it exits, where a controller must be able
to leave them; and a killed parent leaves its socket in the temporary folder.
"""

from __future__ import annotations

import gc
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from submitit.core.core import Job
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.local.local import LocalExecutor, LocalJob

from klab.grid.user_code import python_command
from klab.harness.dispatch.local.fork_command import SILENT, fork_server_command
from klab.harness.dispatch.local.queue_files import LOG
from klab.harness.store import ProcessId
from klab.harness.store.kernels import fix_kernels

_PICKLE_SECONDS = 60.0
"""How long a forked process waits for the pickle of its job."""

_MINUTES = 60 * 24 * 365
"""submitit insists on a time limit; a local job has none."""


class ForkServer:
    """Client of the fork server, which is started on demand, and again when it was killed.

    Args:
        libraries: what jobs use beside torch; the server imports it once for all.
        process: a server that was started before.
    """

    def __init__(self, libraries: Sequence[str] = (), process: subprocess.Popen[bytes] | None = None) -> None:
        self._libraries = tuple(libraries)
        self._process = process

    def submit(self, folder: Path, job: Callable[[], Any]) -> Job[Any]:
        """Run a job in a forked process, as one of submitit's local jobs: its pickles and logs lie in `folder`.

        Where no fork can be had, the job is submitted through submitit's own executor, which starts a new interpreter.
        """
        folder.mkdir(parents=True, exist_ok=True)
        forked = self.fork(folder)
        if forked is None:
            executor = LocalExecutor(folder, python=shlex.join(python_command()))
            executor.update_parameters(timeout_min=_MINUTES, stderr_to_stdout=False)
            return executor.submit(job)
        process: Any = forked
        submitted: Job[Any] = LocalJob(folder=folder, job_id=str(forked.pid), process=process)
        pickle = submitted.paths.submitted_pickle
        temporary = pickle.with_name(f".{pickle.name}.tmp")
        delayed = DelayedSubmission(job)
        delayed.set_timeout(_MINUTES, 3)
        delayed.dump(temporary)
        temporary.replace(pickle)
        return submitted

    def fork(self, folder: Path) -> ForkedProcess | None:
        """A process for the job that is about to be pickled to this folder; None when the server cannot be started."""
        for _ in range(2):
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(OSError):
                process.stdin.write(f"{folder}\n".encode())
                answer = process.stdout.readline().strip()
                if answer.isdigit():
                    return ForkedProcess(int(answer))
            self.end()
        return None

    def end(self) -> None:
        """End the server, not its forks."""
        if self._process is not None:
            self._process.kill()
            with self._process:
                pass
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = fork_server_command(self._libraries)
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        return self._process


class ForkedProcess:
    """A forked process, with as much of `subprocess.Popen` as submitit's local jobs ask for."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = ProcessId.of_pid(pid)

    def poll(self) -> int | None:
        """None while it runs; how it ended is in its cells' folders."""
        return None if self._process is not None and self._process.is_alive() else 0

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def main() -> None:
    """Fork for every line of standard input until it ends; in a fork, run its job."""
    fix_kernels()
    if "transformers" in sys.argv[1:]:
        from transformers import (  # noqa: F401
            AutoTokenizer,
            LlamaConfig,
            PreTrainedTokenizerFast,
            Qwen2Config,
            Qwen3Config,
        )

    import klab.harness.training.runner  # noqa: F401
    from klab.harness.policy.stacked.native.library import library

    library()  # built here where it is not there yet, and loaded once for all jobs
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    silent = SILENT in sys.argv[1:]
    for line in iter(sys.stdin.readline, ""):
        folder = Path(line.rstrip("\n"))
        if silent:
            silent = False
            with (folder.parent / LOG).open("ab") as log:
                os.dup2(log.fileno(), sys.stderr.fileno())
        pid = os.fork()
        if pid == 0:
            _run(folder)
            return
        print(pid, flush=True)


def _run(folder: Path) -> None:
    """Run the job pickled in this folder for this process number, as submitit does in a new interpreter."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    job = str(os.getpid())
    paths = JobPaths(folder, job_id=job, task_id=0)
    _redirect(paths)
    os.environ.update(
        SUBMITIT_EXECUTOR="local",
        SUBMITIT_LOCAL_JOB_ID=job,
        SUBMITIT_LOCAL_NTASKS="1",
        SUBMITIT_LOCAL_JOB_NUM_NODES="1",
        SUBMITIT_LOCAL_NODEID="0",
        SUBMITIT_LOCAL_LOCALID="0",
        SUBMITIT_LOCAL_GLOBALID="0",
        CUDA_VISIBLE_DEVICES="",
    )
    deadline = time.monotonic() + _PICKLE_SECONDS
    while not paths.submitted_pickle.exists() and time.monotonic() < deadline:
        time.sleep(0.005)  # submitit itself looks once a second
    from submitit.core.submission import process_job

    process_job(folder)


def _redirect(paths: JobPaths) -> None:
    """Read nothing from standard input; send standard output and error to the job's logs."""
    with open(os.devnull) as nothing, paths.stdout.open("ab") as out, paths.stderr.open("ab") as errors:
        for file, descriptor in ((nothing, 0), (out, 1), (errors, 2)):
            os.dup2(file.fileno(), descriptor)


if __name__ == "__main__":
    main()
