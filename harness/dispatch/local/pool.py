"""The local pool: a bounded number of jobs at a time over submitit's local executor, which has no queue of its own."""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.job import PackJob
from klab.harness.dispatch.launch import plan_packs
from klab.harness.dispatch.packing.step_times import HardwareKey, StepTimes, have_changed, read_step_times
from klab.harness.dispatch.threads import limit_threads
from klab.harness.store import ProcessId, Run, Snapshot, scan

if TYPE_CHECKING:
    from klab.harness.dispatch.local.fork_server import ForkServer

MAX_LOSSES = 3
"""Times in a row that a cell's process may vanish without progress before the cell counts as failed."""

_MINUTES = 60 * 24 * 365
"""submitit wants a time limit; on one's own machine there is none."""


@dataclass
class RunningJob:
    """A job that was started, by this controller (`job`) or by one before it (`pid`)."""

    cells: tuple[str, ...]
    job: Any = None
    pid: int | None = None
    gpu: str | None = None
    started: float = field(default_factory=time.time)


class Pool:
    """Jobs in flight and packs in waiting of one run, on this machine."""

    def __init__(self, run: Run, losses: int = MAX_LOSSES) -> None:
        self.run = run
        self.losses = losses
        self.waiting: deque[Pack] = deque()
        self.running: list[RunningJob] = []
        self.slots = 1
        self.threads = 1
        self.processes = 1
        self.gpus: list[str] = []
        self.place: HardwareKey | None = None
        self._times: StepTimes = {}
        self._losses: dict[str, tuple[int, int]] = {}
        self._folder: Path | None = None
        self._parent: ForkServer | None = None

    def replace_queue(
        self,
        packs: Iterable[Pack],
        *,
        slots: int,
        threads: int,
        gpus: list[str],
        processes: int = 1,
        place: HardwareKey | None = None,
    ) -> None:
        """Replace what is waiting; cells in flight stay where they are.

        Args:
            place: where step times are measured, to pack what waits anew when there are new ones; None keeps the packs.
        """
        flying = {cell for flight in self.running for cell in flight.cells}
        left = (tuple(cell for cell in pack.cells if cell not in flying) for pack in packs)
        self.waiting = deque(Pack(cells) for cells in left if cells)
        self.slots, self.threads, self.gpus, self.processes, self.place = slots, threads, gpus, processes, place
        self._losses.clear()

    def adopt(self) -> None:
        """Find the jobs that an earlier controller of this machine left running."""
        by_process: dict[int, RunningJob] = {}
        for snapshot in scan(self.run).values():
            claim = snapshot.claim or {}
            holder = ProcessId.from_record(claim)
            if snapshot.alive and holder is not None and holder.is_alive() and claim.get("executor") == "local":
                flight = by_process.setdefault(holder.pid, RunningJob((), pid=holder.pid, gpu=claim.get("gpu") or None))
                flight.cells += (snapshot.id,)
        self.running += by_process.values()

    def step(self) -> bool:
        """Look after ended jobs and start new ones; whether anything changed."""
        ended = [flight for flight in self.running if self._ended(flight)]
        for flight in ended:
            self.running.remove(flight)
            self._after(flight)
        if ended:
            self._pack_anew()
        started = False
        while self.waiting and len(self.running) < self.slots:
            pack = self._wanted(self.waiting.popleft())
            if pack.cells:
                self._start(pack)
            started = True
        return bool(ended) or started

    def devices(self) -> str | None:
        """The GPUs of the next job, one for each of its processes; those that no other job has come first."""
        if not self.gpus:
            return None
        used = {device for flight in self.running for device in (flight.gpu or "").split(",")}
        return ",".join(sorted(self.gpus, key=used.__contains__)[: self.processes])

    def _start(self, pack: Pack) -> None:
        gpu = self.devices()
        job = PackJob(str(self.run.path), pack.cells, self.threads, gpu, self.processes)
        limit_threads(self.threads)
        self.running.append(RunningJob(pack.cells, job=self._executor().submit(job), gpu=gpu))

    def _executor(self) -> Any:
        """A folder of its own for each controller: submitit names files by process number, and numbers come back."""
        from klab.harness.dispatch.local.fork_server import ForkServer, WarmExecutor

        if self._parent is None:
            self._parent = ForkServer()
        if self._folder is None:
            self._folder = self.run.jobs / f"local-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        executor = WarmExecutor(self._folder, self._parent)
        executor.update_parameters(timeout_min=_MINUTES, stderr_to_stdout=False)
        return executor

    def _ended(self, flight: RunningJob) -> bool:
        if flight.job is not None and not flight.job.done():
            return False
        return not any(snapshot.alive for snapshot in scan(self.run, flight.cells).values())

    def _after(self, flight: RunningJob) -> None:
        """Put cells whose process vanished back in front of the queue, or fail them when that keeps happening."""
        lost = []
        for snapshot in scan(self.run, flight.cells).values():
            if not _is_open(snapshot) or _event(snapshot) == "cancelled":
                continue
            update = int((snapshot.heartbeat or {}).get("update") or 0)
            count, before = self._losses.get(snapshot.id, (0, -1))
            count = 1 if update > before else count + 1
            self._losses[snapshot.id] = (count, max(update, before))
            if count < self.losses:
                lost.append(snapshot.id)
            else:
                self.run.cell(snapshot.id).record_failure(
                    f"its process vanished {count} times in a row without progress (killed, or out of memory?)"
                )
        if lost:
            self.waiting.appendleft(Pack(tuple(lost)))
        self._tidy(flight)

    def _pack_anew(self) -> None:
        """Pack what waits by the step times known by now; cells that a process was lost with stay as they are."""
        times = read_step_times(self.run.path.parent, self.place)
        if not have_changed(times, self._times):
            return
        self._times = times
        lost = [pack for pack in self.waiting if any(cell in self._losses for cell in pack.cells)]
        cells = [cell for pack in self.waiting if pack not in lost for cell in pack.cells]
        running = [len(flight.cells) for flight in self.running]
        self.waiting = deque([*lost, *plan_packs(self.run, cells, self.slots, None, self.place, running)])

    def _tidy(self, flight: RunningJob) -> None:
        """Drop the pickles of an ended job, so that a later process of the same number cannot find them."""
        if flight.job is not None:
            for path in (flight.job.paths.submitted_pickle, flight.job.paths.result_pickle):
                with suppress(OSError):
                    os.unlink(path)

    def _wanted(self, pack: Pack) -> Pack:
        """The pack without cells that were finished, failed, cancelled or taken up by somebody else meanwhile."""
        snapshots = scan(self.run, pack.cells).values()
        return Pack(
            tuple(each.id for each in snapshots if _is_open(each) and not each.alive and _event(each) != "cancelled")
        )


def _is_open(snapshot: Snapshot) -> bool:
    return snapshot.result is None and not snapshot.failed and snapshot.problem is None


def _event(snapshot: Snapshot) -> str:
    return str((snapshot.event or {}).get("event", ""))
