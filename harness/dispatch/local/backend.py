"""Jobs on this machine, through a detached controller that keeps a bounded number of them running."""

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
from klab.harness.dispatch.backends import JobStatus, Pack
from klab.harness.dispatch.local import gpus
from klab.harness.dispatch.local.controller import lock_path, request_path, state_path
from klab.harness.dispatch.packing.step_times import HardwareKey
from klab.harness.store import ProcessId, Run, files, machine, scan
from klab.harness.store.lock import is_stale, read_lock

_START_SECONDS = 60.0


class LocalExecutor:
    """The local pool as a backend.

    Args:
        max_parallel: jobs at a time; None: one per GPU where there are any, else one per core.
        device: `cpu` to leave GPUs alone, None or `cuda` to use those there are.
    """

    name = "local"

    def __init__(self, max_parallel: int | None = None, device: str | None = None) -> None:
        self.max_parallel = max_parallel
        self.device = device

    def gpus(self) -> list[str]:
        """The devices to hand out, as CUDA names them."""
        if self.device == "cpu":
            return []
        found = gpus.visible_gpus()
        if self.device == "cuda" and not found:
            raise UserError("there is no NVIDIA GPU here", key="--device", value="cuda", allowed=["cpu"])
        return found

    def processes(self, wanted: Resources) -> int:
        """Processes per job. GPUs that the grid file wants of a larger machine are no reason to fail on this one.

        Raises:
            UserError: more processes than GPUs.
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
        """Jobs at a time."""
        places = len(self.gpus()) or machine.cores() // threads
        return self.max_parallel or max(1, places // processes)

    def submit(self, run: Run, packs: Sequence[Pack], resources: Resources) -> None:
        """Make these packs the controller's queue and see that there is a controller."""
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
        }
        place = HardwareKey.for_launch(self.name, resources, self.device)
        if place is not None and resources.cells_per_job is None:
            request["place"] = asdict(place)
        files.replace(request_path(run), files.encode_record(request))
        if not controller_is_alive(run):
            start_controller(run)

    def states(self, run: Run) -> dict[str, JobStatus]:
        """Cells in the controller's queue; running cells speak for themselves."""
        if not controller_is_alive(run):
            return {}
        found: dict[str, JobStatus] = {}
        try:
            request = files.read_record(request_path(run)) or {}
            state = files.read_record(state_path(run)) or {}
        except UserError:
            return {}
        for cells in request.get("packs", []):  # what the controller has not looked at yet
            found.update({cell: JobStatus("queued", reason="waiting for a free worker") for cell in cells})
        if state.get("ticket") == request.get("ticket"):
            found = {
                cell: JobStatus("queued", reason="waiting for a free worker")
                for cells in state.get("waiting", [])
                for cell in cells
            }
        for flight in state.get("flying", []):
            found.update({cell: JobStatus("queued", str(flight["job"]), "starting") for cell in flight["cells"]})
        return found

    def cancel(self, run: Run, cell_ids: Iterable[str]) -> None:
        """End processes all of whose cells are cancelled; a process with other cells notices by itself."""
        chosen = set(cell_ids)
        cells_of: dict[int, set[str]] = {}
        for snapshot in scan(run).values():
            holder = ProcessId.from_record(snapshot.claim or {})
            if snapshot.alive and holder is not None and holder.is_alive():
                cells_of.setdefault(holder.pid, set()).add(snapshot.id)
        for pid, cells in cells_of.items():
            if cells <= chosen:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGTERM)


def controller_is_alive(run: Run) -> bool:
    record = read_lock(lock_path(run))
    return record is not None and not is_stale(lock_path(run), record)


def start_controller(run: Run) -> None:
    """Start a controller that outlives this process and its terminal, and see that it takes over.

    Raises:
        OSError: when it ends at once; its log is named.
    """
    path = run.jobs / "controller.log"
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
