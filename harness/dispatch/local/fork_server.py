"""Jobs forked from a warm parent: a process that has imported torch, transformers and klab once, for all of them.

As a program this module imports, then reads submitit folders from standard input, one line each, forks for each
a process that does what `submitit.core._submit` would do in a new one, and answers its number. It makes no
tensor, starts no thread and never looks for a GPU, so that a fork may use as many threads and whatever device it was
given. It ends when its standard input does; its forks go on.
"""

from __future__ import annotations

import gc
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from submitit.core.utils import JobPaths
from submitit.local.local import LocalExecutor, LocalJob

from klab.grid.user_code import python_command
from klab.harness.store import ProcessId
from klab.harness.store.kernels import fix_kernels

_PICKLE_SECONDS = 60.0


class ForkServer:
    """The parent as its user sees it: started on demand, and again when it is gone."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def fork(self, folder: Path) -> ForkedProcess | None:
        """A process for the job that is about to be written to this submitit folder; None where none can be had."""
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
        """End the parent, not its forks."""
        if self._process is not None:
            self._process.kill()
            with self._process:
                pass
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = python_command("-m", "klab.harness.dispatch.local.fork_server")
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


class WarmExecutor(LocalExecutor):
    """submitit's local executor: the same folders, pickles, logs and jobs, by forks where they can be had."""

    def __init__(self, folder: Path, parent: ForkServer) -> None:
        super().__init__(folder, python=shlex.join(python_command()))
        self._parent = parent

    def _submit_command(self, command: str) -> Any:
        fork = self._parent.fork(self.folder)
        if fork is None:
            return super()._submit_command(command)
        process: Any = fork
        return LocalJob(folder=self.folder, job_id=str(fork.pid), process=process)


def main() -> None:
    """Fork for every line of standard input until it ends; in a fork, run its job."""
    fix_kernels()
    from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config  # noqa: F401

    import klab.harness.training.runner  # noqa: F401

    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            _run(Path(line.rstrip("\n")))
            return
        print(pid, flush=True)


def _run(folder: Path) -> None:
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
    """Standard input from nowhere, both outputs to the job's logs."""
    with open(os.devnull) as nothing, paths.stdout.open("ab") as out, paths.stderr.open("ab") as errors:
        for file, descriptor in ((nothing, 0), (out, 1), (errors, 2)):
            os.dup2(file.fileno(), descriptor)


if __name__ == "__main__":
    main()
