"""Measured step times: seconds per update and cell, by cost, hardware and pack size, in one file beside the runs.

Jobs of this machine append a line when all their cells are finished; planning reads them. They decide how cells are
packed, never what a cell computes, so a file that is lost or damaged costs nothing but time.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from klab.grid import UserError
from klab.grid.schema.sections import Resources
from klab.harness.dispatch import gpus
from klab.harness.dispatch.packing.balance import NOISE
from klab.harness.dispatch.packing.packs import cost_key
from klab.harness.store import CellFolder, Run, files, machine

FILE = ".step-times.jsonl"
"""Below the folder that holds the runs."""

LAST = 5
"""Of so many newest measurements of one pack size the least counts: whatever else happens on a machine adds time."""

_LEAST = 4
_BYTES = 2**20


StepTimes = dict[str, dict[int, float]]
"""`packs.kind` -> pack size -> seconds per update and cell."""


@dataclass(frozen=True, slots=True)
class HardwareKey:
    """Where step times may be compared: the same processor or GPU, and as many threads."""

    hardware: str
    threads: int

    @classmethod
    def of_this_machine(cls, threads: int, on_gpu: bool) -> HardwareKey:
        """This machine, or its GPUs."""
        found = machine.gpus() if on_gpu else []
        known = machine.hardware()
        return cls(found[0] if found else f"{known['processor']}, {known['cores']} cores", threads)

    @classmethod
    def for_launch(cls, executor: str, resources: Resources, device: str | None = None) -> HardwareKey | None:
        """Where jobs with these resources will run; None where nothing is measured: on other machines, and where
        several processes train a cell."""
        on_gpu = device != "cpu" and bool(gpus.visible_gpus())
        if executor == "slurm" or (resources.processes or 1) > 1 or (on_gpu and resources.gpus > 1):
            return None
        return cls.of_this_machine(min(resources.cpus, machine.cores()), on_gpu)


def record_job(run: Run, cells: Sequence[str], key: HardwareKey, busy: float = 1.0) -> None:
    """Write down what an update of these cells took, which one job trained together from beginning to end.

    The median over updates counts, without the first, for it pays for what is done once. Nothing is written for cells
    with very few updates, or that an earlier job had begun.

    Args:
        busy: the share of that time in which the job had a processor; for the rest of it others had it.
    """
    with suppress(OSError, UserError):
        folders = [run.cell(identity) for identity in cells]
        begun = [sum(event["event"] == "started" for event in folder.attempts()) for folder in folders]
        if any(count > 1 for count in begun):
            return
        spent = [mean(seconds) for seconds in zip(*map(_update_seconds, folders), strict=False)][1:]
        if len(spent) < _LEAST:
            return
        append_measurement(run.path.parent, key, cost_key(run.resolved(cells[0])), len(cells), busy * median(spent))


def _update_seconds(folder: CellFolder) -> list[float]:
    rows = folder.metrics()
    return [sum(value for key, value in row.items() if key.startswith("seconds")) for row in rows]


def append_measurement(runs: Path, key: HardwareKey, cost: str, size: int, seconds: float) -> None:
    """Add a measurement: seconds per update and cell of this `cost_key`, in a pack of `size` cells."""
    path = runs / FILE
    record = {"at": time.time(), "hardware": key.hardware, "threads": key.threads, "kind": cost}
    files.append_lines(path, [{**record, "size": size, "seconds": seconds}])
    if path.stat().st_size > 2 * _BYTES:
        newest = _tail(path)
        files.replace(path, newest[newest.find(b"\n") + 1 :], durable=False)


def read_step_times(runs: Path, key: HardwareKey | None) -> StepTimes:
    """What was measured on this hardware; lines that cannot be read are left out."""
    found: dict[str, dict[int, list[float]]] = {}
    for line in _tail(runs / FILE).split(b"\n") if key is not None else ():
        try:
            record = files.decode_record(line, runs / FILE)
            where = HardwareKey(record["hardware"], record["threads"])
            size, seconds = int(record["size"]), float(record["seconds"])
        except (UserError, KeyError, TypeError, ValueError):
            continue
        if where == key and size > 0 and 0 < seconds < math.inf:
            found.setdefault(record["kind"], {}).setdefault(size, []).append(seconds)
    return {each: {size: min(times[-LAST:]) for size, times in by_size.items()} for each, by_size in found.items()}


def have_changed(new: StepTimes, old: StepTimes) -> bool:
    """Whether there are sizes that were not measured before, or times that changed by more than noise."""
    for cost, times in new.items():
        before = old.get(cost, {})
        if any(size not in before or abs(math.log(times[size] / before[size])) > math.log(NOISE) for size in times):
            return True
    return False


def _tail(path: Path) -> bytes:
    try:
        with files.open_file(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _BYTES))
            return file.read(_BYTES) or b""
    except (OSError, UserError):
        return b""
