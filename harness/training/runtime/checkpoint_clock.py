"""When checkpoints are due by the clock, and which of them are synced to disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DURABLE_SECONDS = 5.0
"""Least time between two checkpoints that are synced to disk, so that they survive a power cut. Every checkpoint
survives the end of the process, and one that a power cut damaged is detected by its checksum."""

MOST_OF_TIME = 0.1
"""Largest share of the time that goes into checkpoints which are due by the clock alone."""


class CheckpointClock:
    """Time since the last checkpoint was complete, and what that one took.

    Args:
        seconds: most seconds between two checkpoints, unless writing them takes more than `MOST_OF_TIME` then.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._took = 0.0
        self._saved_at = self._durable_at = clock()

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self._clock() - self._saved_at >= max(self.seconds, self._took * (1 - MOST_OF_TIME) / MOST_OF_TIME)

    @contextmanager
    def saving(self) -> Iterator[bool]:
        """The block that writes a checkpoint; whether to sync it to disk."""
        began = self._clock()
        durable = began - self._durable_at >= DURABLE_SECONDS
        yield durable
        self._saved_at = self._clock()
        self._took = self._saved_at - began
        if durable:
            self._durable_at = self._saved_at
