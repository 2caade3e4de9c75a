"""Wall time by phase of an update."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

PHASES = ("rollout", "reward", "reference", "forward", "backward", "step")


class PhaseTimer:
    """Adds up the seconds spent in each phase until `take` empties it.

    A GPU is given work faster than it does it: there a phase lasts from when the GPU reaches its beginning until it
    reaches its end, as events in its queue say. They are read in `take`, which waits for the GPU once.

    Args:
        device: that computes the phases.

    >>> timer = PhaseTimer()
    >>> with timer("reward"):
    ...     total = sum(range(10))
    >>> sorted(timer.take([512])[0])
    ['seconds_backward', 'seconds_forward', 'seconds_reference', 'seconds_reward', 'seconds_rollout', 'seconds_step']
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started, event = time.perf_counter(), self._event()
        try:
            yield
        finally:
            if event is None:
                self._spent[phase] += time.perf_counter() - started
            else:
                self._events.append((phase, event, self._event()))

    def _event(self) -> Any:
        """A point in the device's queue of work; None on a CPU, which has none."""
        if self._device.type == "cpu":
            return None
        backend = torch.get_device_module(self._device)
        event = backend.Event(enable_timing=True)
        event.record(backend.current_stream(self._device))
        return event

    @property
    def total(self) -> float:
        """Seconds in all phases since the last `take`."""
        return sum(self._spent.values())

    def add(self, phase: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self._spent[phase] += seconds

    def take(self, work: Sequence[float]) -> list[dict[str, float]]:
        """Seconds per phase since the last call, for each cell of the pack.

        Args:
            work: how much each cell gave to do, in tokens. Phases are shared in proportion to it; the optimizer's step,
                which is the same for every cell, evenly.
        """
        if self._events:
            self._events[-1][2].synchronize()
        for phase, start, end in self._events:
            self._spent[phase] += start.elapsed_time(end) / 1000
        taken = [
            {
                f"seconds_{phase}": spent * (share if phase != "step" else 1 / len(work))
                for phase, spent in self._spent.items()
            }
            for share in shares(work)
        ]
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._events.clear()
        return taken


def shares(work: Sequence[float]) -> list[float]:
    """Each part of the sum, even parts where nothing was done."""
    total = sum(work)
    return [each / total for each in work] if total > 0 else [1 / len(work)] * len(work)
