"""The work of a job: claim its cells, train them, and record how each attempt ended.

The object that submitit pickles holds a path and ids only; everything else is read from the run folder.
"""

from __future__ import annotations

import os
import signal
import sys
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
from klab.harness.dispatch.budget import hold_beyond, is_used_up
from klab.harness.dispatch.gpus import let_segments_grow
from klab.harness.dispatch.notify import tell_of_cells, tell_of_end
from klab.harness.dispatch.packing.step_times import HardwareKey, record_job
from klab.harness.dispatch.processes import started_group
from klab.harness.dispatch.threads import limit_threads
from klab.harness.dispatch.tuning import resolved_cells
from klab.harness.store import CellFolder, LockHeld, ProcessId, Run, machine
from klab.harness.store.kernels import kernels
from klab.harness.store.lock import REFRESH_SECONDS

if TYPE_CHECKING:
    from klab.harness.engines.trl.launcher import Ranks
    from klab.harness.training.distributed.process_group import ProcessGroup
    from klab.harness.training.runner import Progress

_TELLING_SECONDS = 60.0
"""How long the end of a job waits for what is being told of its cells."""

GRACE_SECONDS = 40.0
"""How long after a scheduler's signal the current update may take; then the job requeues without a new checkpoint."""


@dataclass(frozen=True)
class PackJob:
    """The callable that submitit pickles for the local pool.

    Attributes:
        threads: of each process.
        gpu: the device that the pool handed out, for several processes separated by commas; None leaves the environment
            as it is.
        processes: how many train each cell together.
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
        """Called by submitit when it requeues the job: the same callable, which resumes from the checkpoints."""
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
    ranks: Ranks | None = None,
) -> dict[str, str]:
    """Train those of the cells that have no result and no other living worker; returns how each one ended.

    Args:
        progress: called after every update of every cell.
        stop: asked after every update whether to save and end.
        processes: how many train each cell together; all but this one are started here, on `devices`.
        world: the process group, where it exists already.
        ranks: for cells on TRL, the processes of all nodes of a job; None: `processes` on this machine.
    """
    run = Run.open(run_path)
    size = ranks.size if ranks is not None else processes if world is None else world.size
    details = {"executor": executor, **_job_details(run), "processes": size, "threads": threads}
    details["gpus"] = _gpus_of_job(devices)
    named = resolved_cells(run, cells)
    _hold_beyond_budget(run, named, executor)
    claimed = [folder for folder in map(run.cell, named) if _claim(run, folder, details)]
    states: dict[str, str] = {}
    try:
        with _keep_claims_fresh(run, claimed):
            try:
                states = _refuse_changed_data(run, claimed)
                ids = [folder.id for folder in claimed if folder.id not in states]
                for engine, alike in _by_engine(run, ids).items():
                    if engine == "trl":
                        together = ranks or _ranks_here(run, processes)
                        states |= _train_on_trl(run, alike, progress, stop, threads, together)
                    else:
                        states |= _train_on_klab(
                            run, alike, executor, progress, stop, threads, processes, devices, world
                        )
            except Exception:
                for folder in claimed:
                    _record_failure(folder, traceback.format_exc())
                raise
    finally:
        for folder in claimed:
            _record_end(folder, states.get(folder.id, "failed" if folder.error() is not None else "interrupted"))
        tell_of_cells(run, [folder.id for folder in claimed])
        tell_of_end(run)
    return states


def sampling_engines(run: Run, cells: Sequence[str]) -> set[str]:
    """The engines that draw the rollouts of some cells; a cell that cannot be read is left out."""
    found = set()
    for identity in cells:
        with suppress(UserError):
            found.add((run.resolved(identity)["training"].get("sampler") or {}).get("engine", "klab"))
    return found


def _by_engine(run: Run, ids: Sequence[str]) -> dict[str, list[str]]:
    """The cells by `training.engine`."""
    found: dict[str, list[str]] = {}
    for identity in ids:
        found.setdefault(str(run.resolved(identity)["training"].get("engine", "klab")), []).append(identity)
    return found


def _train_on_klab(
    run: Run,
    ids: Sequence[str],
    executor: str,
    progress: Callable[[Progress], None] | None,
    stop: Callable[[], bool] | None,
    threads: int,
    processes: int,
    devices: Sequence[str],
    world: ProcessGroup | None,
) -> dict[str, str]:
    """Train cells with klab's own engine; how each one ended."""
    let_segments_grow(sampling_engines(run, ids))
    with (
        user_code.searching(known=run.user_code()),
        nullcontext(world) if world else started_group(run, processes, threads, devices) as together,
    ):
        from klab.harness.training import run_cells
        from klab.harness.training.pack import device

        began, used = time.monotonic(), time.process_time()
        trained = run_cells(run.path, ids, progress=progress, stop=stop, threads=threads, process_group=together)
    if together is None and executor != "slurm" and set(trained.values()) == {"finished"}:
        on_gpu, busy = device().type == "cuda", 1.0
        if threads == 1 and not on_gpu:
            busy = min(1.0, (time.process_time() - used) / (time.monotonic() - began))
        record_job(run, ids, HardwareKey.of_this_machine(threads, on_gpu), busy)
    return trained


def _train_on_trl(
    run: Run,
    ids: Sequence[str],
    progress: Callable[[Progress], None] | None,
    stop: Callable[[], bool] | None,
    threads: int,
    ranks: Ranks | None,
) -> dict[str, str]:
    """Train cells with TRL's trainer, one after another; how each one ended."""
    from klab.harness.engines.trl.run import train_cells

    with user_code.searching(known=run.user_code()):
        return train_cells(run.path, ids, progress=progress, stop=stop, threads=threads, ranks=ranks)


def _ranks_here(run: Run, processes: int) -> Ranks | None:
    """The processes on this machine that a launcher starts for TRL; None where this one trains alone."""
    launcher = run.resources.launcher
    if processes == 1 and launcher is None:
        return None
    from klab.harness.engines.trl.launcher import Ranks

    return Ranks(processes, accelerate=None if launcher is None else launcher.accelerate)


class StopSignal:
    """Turns a request to stop (SIGTERM, and submitit's SIGUSR2) into a flag that training reads after every update.

    submitit's own handler requeues and exits at any point of the program; here it runs when the current update is done
    and saved, or after `grace` seconds, whichever comes first.
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
        """Let submitit requeue the job and end this process, if a SIGUSR2 came; otherwise return."""
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


def _claim(run: Run, folder: CellFolder, details: dict[str, Any]) -> bool:
    """Whether this process now trains the cell. A damaged file fails its own cell only.

    A cell that was cancelled or held while its job waited or started is left alone: `cancel` and `hold` record that
    before they look for jobs, and it is read here after the start is recorded, so that one of the two sees the other.
    """
    try:
        if folder.result() is not None:
            return False
        folder.claim(details=details)
        if folder.result() is not None or folder.withheld() is not None:
            folder.release_claim()
            return False
        attempt = 1 + sum(event["event"] == "started" for event in folder.attempts())
    except LockHeld:
        return False
    except UserError as error:
        _record_failure(folder, str(error))
        folder.release_claim()
        return False
    process = ProcessId.current()
    start = {"event": "started", "at": time.time(), "attempt": attempt, "host": process.host, "pid": process.pid}
    if (beat := folder.heartbeat()) is not None:  # of the attempt before, which may have been killed
        start["seen"] = beat.get("at")
    versions = machine.versions(run.libraries(folder.id))
    folder.append_attempt({**start, **details, "versions": versions, "kernels": kernels()})
    if (withheld := folder.withheld()) is not None:  # in between: the newest event has to say so again
        folder.append_attempt({**withheld, "at": time.time()})
        folder.release_claim()
        return False
    return True


def _record_end(folder: CellFolder, state: str) -> None:
    with suppress(OSError):
        if state != "cancelled" and (folder.last_attempt() or {}).get("event") != "cancelled":
            folder.append_attempt({"event": "ended", "at": time.time(), "state": state})
    folder.release_claim()


def _hold_beyond_budget(run: Run, cells: Sequence[str], executor: str) -> None:
    """Hold the cells of a job that starts when the run's budget is used up."""
    budget = is_used_up(run)
    if budget is None:
        return
    open_ = [name for name in cells if run.cell(name).result() is None and run.cell(name).withheld() is None]
    hold_beyond(run, open_, budget, executor)
    if open_:
        print(f"klab: the budget is used up: {len(open_)} cells are held", file=sys.stderr, flush=True)


def _gpus_of_job(devices: Sequence[str]) -> int:
    """How many GPUs this job has, on all of its nodes."""
    on_node = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if on_node.isdecimal():
        return int(on_node) * int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    return len([name for name in devices if name.strip()])


def _refuse_changed_data(run: Run, claimed: Sequence[CellFolder]) -> dict[str, str]:
    """Fail the cells whose data or models are not those that the run has recorded; their states."""
    found = run.changed_data(folder.id for folder in claimed)
    for folder in claimed:
        if folder.id in found:
            problem = UserError(
                f"{', '.join(found[folder.id])} changed since the run was launched: the cell would not be comparable",
                file=run.path,
                hint="Put the versions from before back and `klab launch GRID --retry-failed`, or train it all the "
                "same: `klab launch GRID --retry-failed --accept-changes`.",
            )
            folder.clear_failure()
            _record_failure(folder, str(problem))
            print(f"klab: {folder.id}: {problem}", file=sys.stderr, flush=True)
    return dict.fromkeys(found, "failed")


def _record_failure(folder: CellFolder, text: str) -> None:
    with suppress(OSError, UserError):  # where even this cannot be written, the job's log has it
        if folder.result() is None and folder.error() is None:
            folder.record_failure(text)


def _job_details(run: Run) -> dict[str, Any]:
    """Job id, log (relative to the run folder) and devices of this process."""
    details: dict[str, Any] = {"job": "", "log": "", "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    if os.environ.get("SUBMITIT_FOLDER"):
        from submitit import JobEnvironment

        environment = JobEnvironment()
        details["job"] = environment.job_id
        with suppress(ValueError):
            details["log"] = str(environment.paths.stderr.resolve().relative_to(run.path))
    return details


@contextmanager
def _keep_claims_fresh(run: Run, folders: list[CellFolder]) -> Iterator[None]:
    """Refresh the claims while an update may take long, so that other machines do not take this process for dead; and
    tell of cells that end before their mates do."""
    over = threading.Event()

    def refresh() -> None:
        while not over.wait(REFRESH_SECONDS):
            for folder in folders:
                folder.refresh_claim()
            tell_of_cells(run, [folder.id for folder in folders])

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_TELLING_SECONDS)
