"""What a job does: claim its cells, train them, and leave word of how each attempt ended.

The object that travels through submitit holds a path and ids only; everything else is read from the run folder.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from klab.grid import UserError, user_code
from klab.harness.dispatch.packing.step_times import HardwareKey, record_job
from klab.harness.dispatch.processes import started_group
from klab.harness.dispatch.threads import limit_threads
from klab.harness.store import CellFolder, LockHeld, ProcessId, Run
from klab.harness.store.kernels import kernels
from klab.harness.store.lock import REFRESH_SECONDS

if TYPE_CHECKING:
    from klab.harness.training.distributed.process_group import ProcessGroup
    from klab.harness.training.runner import Progress

GRACE_SECONDS = 40.0
"""How long a scheduler's signal waits for the end of an update before the job gives way without a fresh checkpoint."""


@dataclass(frozen=True)
class PackJob:
    """The callable that submitit pickles for the local pool.

    `gpu` is the device that the local pool handed out, or those of several processes with commas between them (None
    leaves the environment as it is), `threads` the number of threads of each process.
    """

    run: str
    cells: tuple[str, ...]
    threads: int = 1
    gpu: str | None = None
    processes: int = 1

    def __call__(self) -> dict[str, str]:
        limit_threads(self.threads)
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        with StopSignal() as stop_signal:
            states = run_job(
                self.run,
                self.cells,
                executor="local",
                threads=self.threads,
                stop=stop_signal.requested,
                processes=self.processes,
                devices=self.gpu.split(",") if self.gpu else (),
            )
        stop_signal.requeue()
        return states

    def checkpoint(self) -> Any:
        """submitit calls this when it requeues the job: the same again, which finds the checkpoints."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_job(
    run_path: str | Path,
    cells: tuple[str, ...],
    *,
    executor: str,
    threads: int = 1,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    processes: int = 1,
    devices: Sequence[str] = (),
    world: ProcessGroup | None = None,
) -> dict[str, str]:
    """Train those of the cells that have no result and no other living worker; how each one ended.

    Args:
        processes: how many train each cell together; the others are started here, on `devices`.
        world: those that train together, where they have met already.
    """
    run = Run.open(run_path)
    size = processes if world is None else world.size
    place = {"executor": executor, **_job_details(run), "processes": size, "threads": threads}
    claimed = [folder for folder in map(run.cell, cells) if _claim(folder, place)]
    states: dict[str, str] = {}
    try:
        with _keep_claims_fresh(claimed):
            try:
                ids = [folder.id for folder in claimed]
                if ids:
                    with (
                        user_code.searching(known=run.user_code()),
                        nullcontext(world) if world else started_group(run, processes, threads, devices) as together,
                    ):
                        from klab.harness.training import run_cells
                        from klab.harness.training.pack import device

                        began, used = time.monotonic(), time.process_time()
                        states = run_cells(
                            run.path, ids, progress=progress, stop=stop, threads=threads, process_group=together
                        )
                    if together is None and executor != "slurm" and set(states.values()) == {"finished"}:
                        on_gpu, busy = device().type == "cuda", 1.0
                        if threads == 1 and not on_gpu:
                            busy = min(1.0, (time.process_time() - used) / (time.monotonic() - began))
                        record_job(run, ids, HardwareKey.of_this_machine(threads, on_gpu), busy)
            except Exception:
                for folder in claimed:
                    _record_failure(folder, traceback.format_exc())
                raise
    finally:
        for folder in claimed:
            _record_end(folder, states.get(folder.id, "failed" if folder.error() is not None else "interrupted"))
    return states


class StopSignal:
    """Turns a request to stop (SIGTERM, and submitit's SIGUSR2) into a flag that training looks at after every update.

    submitit's own handler requeues and exits at whatever point the signal finds the program; here it runs when the
    update is done and saved, or after `grace` seconds, whichever is first.
    """

    def __init__(self, *numbers: int, grace: float = GRACE_SECONDS) -> None:
        self._numbers = numbers or (signal.SIGTERM, signal.SIGUSR2)
        self._grace = grace
        self._asked = threading.Event()
        self._requeue = False
        self._before: dict[int, Any] = {}

    def requested(self) -> bool:
        return self._asked.is_set()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def requeue(self) -> None:
        """After a SIGUSR2: let submitit requeue the job and end the process."""
        handler = self._before.get(signal.SIGUSR2)
        if self._requeue and callable(handler):
            handler(signal.SIGUSR2, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2 and self._requeue:  # the second one, after the grace
            self.requeue()
            return
        if number == signal.SIGINT and self.requested():  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self._asked.set()
        if number == signal.SIGUSR2:
            self._requeue = True
            timer = threading.Timer(self._grace, os.kill, (os.getpid(), signal.SIGUSR2))
            timer.daemon = True
            timer.start()


def _claim(folder: CellFolder, place: dict[str, Any]) -> bool:
    """Whether the cell is now this process's to train. A damaged file fails its cell, and only that one."""
    try:
        if folder.result() is not None:
            return False
        folder.claim(details=place)
        if folder.result() is not None:
            folder.release_claim()
            return False
        attempt = 1 + sum(event["event"] == "started" for event in folder.attempts())
    except LockHeld:
        return False
    except UserError as error:
        _record_failure(folder, str(error))
        folder.release_claim()
        return False
    holder = ProcessId.current()
    life = {"event": "started", "at": time.time(), "attempt": attempt, "host": holder.host, "pid": holder.pid}
    folder.append_attempt({**life, **place, "kernels": kernels()})
    return True


def _record_end(folder: CellFolder, state: str) -> None:
    with suppress(OSError):
        if state != "cancelled" and (folder.last_attempt() or {}).get("event") != "cancelled":
            folder.append_attempt({"event": "ended", "at": time.time(), "state": state})
    folder.release_claim()


def _record_failure(folder: CellFolder, text: str) -> None:
    with suppress(OSError, UserError):  # where even this cannot be written, the job's log has it
        if folder.result() is None and folder.error() is None:
            folder.record_failure(text)


def _job_details(run: Run) -> dict[str, Any]:
    """Job id, log (relative to the run folder) and devices of this process."""
    place: dict[str, Any] = {"job": "", "log": "", "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    if os.environ.get("SUBMITIT_FOLDER"):
        from submitit import JobEnvironment

        environment = JobEnvironment()
        place["job"] = environment.job_id
        with suppress(ValueError):
            place["log"] = str(environment.paths.stderr.resolve().relative_to(run.path))
    return place


@contextmanager
def _keep_claims_fresh(folders: list[CellFolder]) -> Iterator[None]:
    """Show other machines that this process lives, however long an update takes."""
    over = threading.Event()

    def touch() -> None:
        while not over.wait(REFRESH_SECONDS):
            for folder in folders:
                folder.refresh_claim()

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
