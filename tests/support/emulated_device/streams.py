"""Streams of the emulated device: an operation that does not wait for what it reads is an error.

Everything is computed at once and in program order, so a missing wait would not show in the numbers. Each stream
therefore has a clock, and knows up to which time of the others it has waited (vector clocks, Mattern 1989).
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from tests.support.emulated_device.memory import Allocation
from tests.support.emulated_device.tensor import DISPATCH


class Stream:
    """A queue of operations; `device` and `priority` are accepted and ignored."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.time = 0
        self.seen: dict[Stream, int] = {}

    def wait_stream(self, other: Stream) -> None:
        """What this stream computes from now on comes after what the other has been given."""
        for stream, moment in [*other.seen.items(), (other, other.time)]:
            self.seen[stream] = max(moment, self.seen.get(stream, 0))

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        for stream, moment in event.seen.items():
            self.seen[stream] = max(moment, self.seen.get(stream, 0))

    def check(self, read: Iterable[Allocation], written: Iterable[Allocation]) -> None:
        """Raise RuntimeError where an operation of this stream may run before what it depends on."""
        self.time += 1
        changed = list(written)
        for memory in [*read, *changed]:
            if memory.written is not None:
                self._must_follow(*memory.written, "reads what another stream writes")
        for memory in changed:
            for stream, moment in memory.read.items():
                self._must_follow(stream, moment, "overwrites what another stream reads")
            memory.written, memory.read = (self, self.time), {}
        for memory in read:
            memory.read[self] = self.time

    def _must_follow(self, stream: Stream, moment: int, mistake: str) -> None:
        if stream is not self and self.seen.get(stream, 0) < moment:
            raise RuntimeError(f"a stream {mistake}, without waiting for it")


class Event:
    """A point in a stream's time, and in seconds when the device reaches it."""

    def __init__(self, **settings: object) -> None:
        self.seen: dict[Stream, int] = {}
        self.reached = 0.0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or DISPATCH[-1].stream
        self.seen = {**stream.seen, stream: stream.time}
        self.reached = max(time.perf_counter(), DISPATCH[-1].busy_until)

    def synchronize(self) -> None:
        DISPATCH[-1].wait("synchronize with an event")

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds until another event."""
        return (later.reached - self.reached) * 1000


DEFAULT = Stream()
"""Where operations go unless told otherwise; the same for all emulated devices of a process, which may share tensors
that klab keeps."""
