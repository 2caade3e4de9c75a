"""The local pool as an executor: a background controller keeps a bounded number of jobs running on this machine."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from klab.grid import UserError
from klab.grid.schema.sections import Resources
from klab.grid.user_code import python_command
from klab.harness.dispatch import gpus
from klab.harness.dispatch.backends import JobStatus, Pack
from klab.harness.dispatch.local.queue_files import (
    controller_is_alive,
    log_path,
    read_request,
    read_state,
    request_path,
)
from klab.harness.dispatch.local.ready import ReadyController
from klab.harness.dispatch.packing.plan import plan_packs
from klab.harness.dispatch.packing.step_times import HardwareKey
from klab.harness.dispatch.tuning import pending, second_stage_names
from klab.harness.store import ProcessId, Run, files, machine, scan

_START_SECONDS = 60.0
"""How long a controller may take to start."""


class LocalExecutor:
    """Jobs on this machine, in the background.

    Args:
        max_parallel: jobs at a time; None: one per GPU where there are any, else one per core.
        device: `cpu` to leave GPUs alone, None or `cuda` to use those there are.
        ready: a process that becomes the controller where one is needed.
    """

    name = "local"

    def __init__(
        self, max_parallel: int | None = None, device: str | None = None, ready: ReadyController | None = None
    ) -> None:
        self.max_parallel = max_parallel
        self.device = device
        self._ready = ready

    def gpus(self) -> list[str]:
        """The devices to hand out, as CUDA names them.

        Raises:
            UserError: when a GPU was asked for and there is none.
        """
        if self.device == "cpu":
            return []
        found = gpus.visible_gpus()
        if self.device == "cuda" and not found:
            raise UserError("there is no NVIDIA GPU here", key="--device", value="cuda", allowed=["cpu"])
        return found

    def processes(self, wanted: Resources) -> int:
        """Processes per job; a grid file written for a machine with more GPUs gets as many as there are here.

        Raises:
            UserError: when more processes were asked for than there are GPUs.
        """
        count = len(self.gpus())
        if wanted.processes is None:
            return max(1, min(wanted.gpus, count))
        if count and wanted.processes > count:
            raise UserError(
                f"each process needs a GPU of its own, and there are {count} here",
                key="resources.processes",
                value=wanted.processes,
                hint="--device cpu leaves GPUs alone.",
            )
        return wanted.processes

    def slots(self, threads: int = 1, processes: int = 1) -> int:
        """Jobs at a time: as asked for, else one per GPU, or per `threads` cores, divided by the processes of a job."""
        room = len(self.gpus()) or machine.cores() // threads
        return self.max_parallel or max(1, room // processes)

    def submit(self, run: Run, packs: Sequence[Pack], resources: Resources) -> None:
        """Make these packs the controller's queue, and start a controller unless one is alive."""
        threads, processes = min(resources.cpus, machine.cores()), self.processes(resources)
        run.jobs.mkdir(parents=True, exist_ok=True)
        request: dict[str, Any] = {
            "ticket": secrets.token_hex(8),
            "at": time.time(),
            "packs": [list(pack.cells) for pack in packs],
            "slots": self.slots(threads, processes),
            "threads": threads,
            "processes": processes,
            "gpus": [gpus.HIDDEN] if self.device == "cpu" else self.gpus(),
            "cells_per_job": resources.cells_per_job,
        }
        hardware = HardwareKey.for_launch(self.name, resources, self.device)
        if hardware is not None and resources.cells_per_job is None:
            request["place"] = asdict(hardware)
        files.replace(request_path(run), files.encode_record(request))
        if not controller_is_alive(run):
            start_controller(run, self._ready)
        self.end_ready()

    def end_ready(self) -> None:
        """End the process that was ready to be a controller, unless it has become one."""
        if self._ready is not None:
            self._ready.end()
            self._ready = None

    def states(self, run: Run) -> dict[str, JobStatus]:
        """The cells in the controller's queue; the state of running cells is known from their own folders."""
        if not controller_is_alive(run):
            return {}
        found: dict[str, JobStatus] = {}
        try:
            request, state = read_request(run), read_state(run)
        except UserError:
            return {}
        for cells in request.get("packs", []):  # what the controller has not read yet
            found.update({cell: JobStatus("queued", reason="waiting for a free worker") for cell in cells})
        if state.get("ticket") == request.get("ticket"):
            found = {
                cell: JobStatus("queued", reason="waiting for a free worker")
                for cells in state.get("waiting", [])
                for cell in cells
            }
        # The controller starts the second stage of a tuned run itself.
        for cell in (*pending(run), *second_stage_names(run).values()):
            found.setdefault(cell, JobStatus("queued", reason="waits for tuning"))
        for job in state.get("flying", []):
            found.update({cell: JobStatus("queued", str(job["job"]), "starting") for cell in job["cells"]})
        return found

    def cancel(self, run: Run, cell_ids: Iterable[str]) -> None:
        """End processes all of whose cells are cancelled; one with other cells drops the cancelled ones itself."""
        chosen = set(cell_ids)
        cells_of: dict[int, set[str]] = {}
        for snapshot in scan(run).values():
            process = ProcessId.from_record(snapshot.claim or {})
            if snapshot.alive and process is not None and process.is_alive():
                cells_of.setdefault(process.pid, set()).add(snapshot.id)
        for pid, cells in cells_of.items():
            if cells <= chosen:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGTERM)

    def hold(self, run: Run, cell_ids: Iterable[str]) -> None:
        """Nothing to do: the controller reads what is held before it starts a pack, and so does a job."""

    def release(self, run: Run, cell_ids: Iterable[str]) -> set[str]:
        """Put those of the cells back into the queue that were in it, as the last launch packed cells."""
        request = read_request(run)
        if not request:
            return set()
        snapshots = scan(run, cell_ids)
        cells = [name for name, each in snapshots.items() if (each.event or {}).get("queue") == self.name]
        if not cells:
            return set()
        waiting: list[list[str]] = []
        if alive := controller_is_alive(run):
            state = read_state(run)
            waiting = state["waiting"] if state.get("ticket") == request.get("ticket") else request["packs"]
        queued = {cell for pack in waiting for cell in pack}
        place = HardwareKey(**request["place"]) if request.get("place") else None
        new = [cell for cell in cells if cell not in queued]
        packs = plan_packs(run, new, int(request["slots"]), request.get("cells_per_job"), place)
        packed = [*waiting, *(list(pack.cells) for pack in packs)]
        record = {**request, "ticket": secrets.token_hex(8), "at": time.time(), "packs": packed}
        files.replace(request_path(run), files.encode_record(record))
        if not alive:
            start_controller(run)
        return set(cells)


def abandoned_cells(run: Run) -> set[str]:
    """The cells in the queue of a controller that is gone: killed, or failed. Those of them that are still open wait
    for nobody, since a controller that ends by itself leaves none: each has a result or a failure, or was cancelled.
    """
    if controller_is_alive(run):
        return set()
    try:
        request, state = read_request(run), read_state(run)
    except UserError:
        return set()
    packs = request.get("packs", [])
    if state.get("ticket") == request.get("ticket"):
        packs = [*state.get("waiting", []), *(job.get("cells", []) for job in state.get("flying", []))]
    return {cell for pack in packs for cell in pack}


def start_controller(run: Run, ready: ReadyController | None = None) -> None:
    """Start a controller that outlives this process and its terminal; returns when it works on the queue.

    Args:
        ready: a process that is to become it, unless it has ended.

    Raises:
        OSError: when it ends at once; the message names its log.
    """
    path = log_path(run)
    process = ready.begin(run.path) if ready is not None else None
    if process is None:
        with path.open("ab") as log:
            process = subprocess.Popen(
                python_command("-m", "klab.harness.dispatch.local.controller", str(run.path)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    deadline = time.monotonic() + _START_SECONDS
    while not controller_is_alive(run) and time.monotonic() < deadline:
        code = process.poll()
        if code == 0:
            return  # nothing was left to do
        if code is not None:
            raise OSError(f"the local controller ended at once with code {code}; see {path}")
        time.sleep(0.05)
