"""Training in this process, one pack after the other, in the foreground."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from klab.grid.schema.sections import Resources
from klab.harness.dispatch import gpus
from klab.harness.dispatch.backends import JobStatus, Pack
from klab.harness.dispatch.job import StopSignal, run_job
from klab.harness.dispatch.local.backend import LocalExecutor
from klab.harness.dispatch.threads import limit_threads
from klab.harness.store import Run, machine

if TYPE_CHECKING:
    from klab.harness.training.runner import Progress


class InlineExecutor:
    """This process as a backend. The first Ctrl-C saves after the current update and ends; the second ends at once.

    Args:
        progress: told about every update of every cell.
        device: `cpu` to leave GPUs alone.
    """

    name = "here"

    def __init__(self, progress: Callable[[Progress], None] | None = None, device: str | None = None) -> None:
        self.progress = progress
        self.device = device
        self.interrupted = False

    def submit(self, run: Run, packs: Sequence[Pack], resources: Resources) -> None:
        """Train all packs; returns when they are done, failed, or interrupted (then `interrupted` is set)."""
        threads = max(1, min(resources.cpus, machine.cores()))
        limit_threads(threads)
        local = LocalExecutor(device=self.device)
        processes, devices = local.processes(resources), local.gpus()
        if self.device == "cpu":
            gpus.hide_gpus()
        with StopSignal(signal.SIGINT, signal.SIGTERM) as stop_signal:
            for pack in packs:
                run_job(
                    run.path,
                    pack.cells,
                    executor=self.name,
                    threads=threads,
                    progress=self.progress,
                    stop=stop_signal.requested,
                    processes=processes,
                    devices=devices[:processes],
                )
                if stop_signal.requested():
                    self.interrupted = True
                    return

    def states(self, run: Run) -> dict[str, JobStatus]:
        return {}

    def cancel(self, run: Run, cell_ids: Iterable[str]) -> None:
        """Nothing to do: the process notices after its current update that the cell is no longer its own."""

    def hold(self, run: Run, cell_ids: Iterable[str]) -> None:
        """Nothing to do: a pack reads what is held before it starts."""

    def release(self, run: Run, cell_ids: Iterable[str]) -> set[str]:
        """None start by themselves: a launch in the foreground has passed them by."""
        return set()
