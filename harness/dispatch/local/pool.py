"""The local pool: a bounded number of jobs at a time, since submitit's local executor starts every job at once."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.job import PackJob
from klab.harness.dispatch.local.fork_command import libraries_of
from klab.harness.dispatch.local.fork_server import ForkServer
from klab.harness.dispatch.notify import tell_of_cells, tell_of_end
from klab.harness.dispatch.packing.plan import plan_packs
from klab.harness.dispatch.packing.step_times import HardwareKey, StepTimes, have_changed, read_step_times
from klab.harness.dispatch.threads import limit_threads
from klab.harness.store import ProcessId, Run, Snapshot, scan

MAX_LOSSES = 3
"""Times in a row that a cell's process may die without progress before the cell counts as failed."""


@dataclass
class RunningJob:
    """A job that was started by this controller (`job`), or by one before it (`pid`)."""

    cells: tuple[str, ...]
    job: Any = None
    pid: int | None = None
    gpu: str | None = None
    started: float = field(default_factory=time.time)


class Pool:
    """Running jobs and waiting packs of one run on this machine.

    Args:
        losses: times in a row that a cell's process may die without progress.
        server: a fork server that was started before.
    """

    def __init__(self, run: Run, losses: int = MAX_LOSSES, server: subprocess.Popen[bytes] | None = None) -> None:
        self.run = run
        self.losses = losses
        self.waiting: deque[Pack] = deque()
        self.running: list[RunningJob] = []
        self.slots = 1
        self.threads = 1
        self.processes = 1
        self.gpus: list[str] = []
        self.hardware: HardwareKey | None = None
        self._times: StepTimes = {}
        self._losses: dict[str, tuple[int, int]] = {}
        # one folder per controller: submitit names files by process number, and those are used again
        self._folder = run.jobs / f"local-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        self._server = ForkServer(libraries_of(map(run.resolved, run.cells)), server)

    def replace_queue(
        self,
        packs: Iterable[Pack],
        *,
        slots: int,
        threads: int,
        gpus: list[str],
        processes: int = 1,
        hardware: HardwareKey | None = None,
    ) -> None:
        """Replace the waiting packs; running cells stay where they are.

        Args:
            packs: in the order in which free slots take them.
            slots: jobs at a time.
            threads: of each process.
            gpus: devices to hand out, as CUDA names them.
            processes: of each job.
            hardware: whose step times decide how waiting cells are packed anew; None keeps the packs as given.
        """
        running = {cell for each in self.running for cell in each.cells}
        left = (tuple(cell for cell in pack.cells if cell not in running) for pack in packs)
        self.waiting = deque(Pack(cells) for cells in left if cells)
        self.slots, self.threads, self.gpus, self.processes, self.hardware = slots, threads, gpus, processes, hardware
        self._losses.clear()

    def extend_queue(self, cells: Sequence[str], size: int | None) -> None:
        """Put cells behind those that wait, in packs of at most `size`."""
        self.waiting.extend(plan_packs(self.run, cells, self.slots, size, self.hardware))

    def adopt(self) -> None:
        """Take over the jobs that an earlier controller of this machine left running."""
        by_process: dict[int, RunningJob] = {}
        for snapshot in scan(self.run).values():
            claim = snapshot.claim or {}
            process = ProcessId.from_record(claim)
            if snapshot.alive and process is not None and process.is_alive() and claim.get("executor") == "local":
                job = by_process.setdefault(process.pid, RunningJob((), pid=process.pid, gpu=claim.get("gpu") or None))
                job.cells += (snapshot.id,)
        self.running += by_process.values()

    def step(self) -> bool:
        """Deal with jobs that ended, and start new ones; whether anything changed."""
        ended = [each for each in self.running if self._has_ended(each)]
        for each in ended:
            self.running.remove(each)
            self._requeue_lost_cells(each)
        if ended:
            self._repack()
        started = False
        while self.waiting and len(self.running) < self.slots:
            pack = self._still_wanted(self.waiting.popleft())
            if pack.cells:
                self._start(pack)
            started = True
        return bool(ended) or started

    def next_gpus(self) -> str | None:
        """The GPUs of the next job, one for each of its processes: those with the fewest jobs."""
        if not self.gpus:
            return None
        load = Counter(device for each in self.running for device in (each.gpu or "").split(","))
        return ",".join(sorted(self.gpus, key=load.__getitem__)[: self.processes])

    def _start(self, pack: Pack) -> None:
        gpu = self.next_gpus()
        job = PackJob(str(self.run.path), pack.cells, self.threads, gpu, self.processes)
        limit_threads(self.threads)
        self.running.append(RunningJob(pack.cells, job=self._server.submit(self._folder, job), gpu=gpu))

    def _has_ended(self, job: RunningJob) -> bool:
        if job.job is not None and not job.job.done():
            return False
        return not any(snapshot.alive for snapshot in scan(self.run, job.cells).values())

    def _requeue_lost_cells(self, job: RunningJob) -> None:
        """Put cells whose process died first into the queue, or fail them when that keeps happening."""
        lost = []
        for snapshot in scan(self.run, job.cells).values():
            if not _is_open(snapshot):
                continue
            update = int((snapshot.heartbeat or {}).get("update") or 0)
            count, before = self._losses.get(snapshot.id, (0, -1))
            count = 1 if update > before else count + 1
            self._losses[snapshot.id] = (count, max(update, before))
            if count < self.losses:
                lost.append(snapshot.id)
            else:
                self.run.cell(snapshot.id).record_failure(
                    f"worker process died {count} times in a row without progress (killed, or out of memory?)"
                )
                tell_of_cells(self.run, [snapshot.id])
                tell_of_end(self.run)
        if lost:
            self.waiting.appendleft(Pack(tuple(lost)))
        self._remove_pickles(job)

    def _repack(self) -> None:
        """Pack waiting cells by the step times known by now; cells whose process died stay packed as they are."""
        times = read_step_times(self.run.path.parent, self.hardware)
        if not have_changed(times, self._times):
            return
        self._times = times
        lost = [pack for pack in self.waiting if any(cell in self._losses for cell in pack.cells)]
        cells = [cell for pack in self.waiting if pack not in lost for cell in pack.cells]
        running = [len(each.cells) for each in self.running]
        self.waiting = deque([*lost, *plan_packs(self.run, cells, self.slots, None, self.hardware, running)])

    def _remove_pickles(self, job: RunningJob) -> None:
        """Drop the pickles of an ended job, so that a later process of the same number cannot find them."""
        if job.job is not None:
            for path in (job.job.paths.submitted_pickle, job.job.paths.result_pickle):
                with suppress(OSError):
                    os.unlink(path)

    def _still_wanted(self, pack: Pack) -> Pack:
        """The pack without cells that meanwhile ended, were cancelled or held, or are trained by somebody else."""
        snapshots = scan(self.run, pack.cells).values()
        return Pack(tuple(each.id for each in snapshots if _is_open(each) and not each.alive))


def _is_open(snapshot: Snapshot) -> bool:
    """Whether a cell still has to run: no result, no failure, not cancelled, not held."""
    return not (snapshot.result or snapshot.failed or snapshot.problem or snapshot.cancelled or snapshot.held)
