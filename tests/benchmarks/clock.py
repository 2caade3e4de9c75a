"""Clocks and memory of a process that is measured, in either environment, and medians of what clocks said."""

from __future__ import annotations

import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

import torch

Clock = Callable[[], float]


def wall() -> float:
    """Seconds of the wall clock, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS: dict[str, Clock] = {"processor": time.process_time, "wall": wall}
"""`processor` is not lengthened by busy neighbours, and says nothing about a GPU."""


def device_name() -> str:
    """The GPU on which this process trains, else the kind of processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}"


def usage() -> dict[str, float]:
    """What this process took: processor seconds, its peak of memory and, on a GPU, the peaks of what tensors held
    there and of what was kept for them. CUDA's own context is not counted."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {"peak_mb": used.ru_maxrss / 1024, "process_cpu": used.ru_utime + used.ru_stime}
    if torch.cuda.is_available():
        found["device_mb"] = torch.cuda.max_memory_allocated() / 2**20
        found["device_kept_mb"] = torch.cuda.max_memory_reserved() / 2**20
    return found


def meet(folder: Path | None, processes: int) -> None:
    """Wait until so many processes are here."""
    if folder is None:
        return
    (folder / uuid4().hex).touch()
    while len(list(folder.iterdir())) < processes:
        time.sleep(0.01)


def per_update(updates: Sequence[dict[str, float]], span: int, dropped: int) -> dict[str, float]:
    """Medians over rollouts of milliseconds per update, of all but the first rollouts; the `span` updates of a rollout
    are averaged."""
    rollouts = [updates[i : i + span] for i in range(span * dropped, len(updates) - span + 1, span)]
    names = sorted({name for update in updates for name in update})
    means = {n: [statistics.mean(u.get(n, 0.0) for u in rollout) for rollout in rollouts] for n in names}
    return {name: 1e3 * statistics.median(values) for name, values in means.items()}
