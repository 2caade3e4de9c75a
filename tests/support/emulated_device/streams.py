"""Streams of the emulated device: an operation that does not wait for what it reads is an error.

Everything is computed at once and in program order, so a missing wait would not show in the numbers. Each stream
therefore has a clock, and knows up to which time of the others it has waited (vector clocks, Mattern 1989).
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.emulated_device.memory import Allocation


class Stream:
    """A queue of operations; `device` and `priority` are accepted and ignored."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.time = 0
        self.seen: dict[Stream, int] = {}

    def wait_stream(self, other: Stream) -> None:
        """What this stream computes from now on comes after what the other has been given."""
        for stream, time in [*other.seen.items(), (other, other.time)]:
            self.seen[stream] = max(time, self.seen.get(stream, 0))

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        for stream, time in event.seen.items():
            self.seen[stream] = max(time, self.seen.get(stream, 0))

    def check(self, read: Iterable[Allocation], written: Iterable[Allocation]) -> None:
        """Raise RuntimeError where an operation of this stream may run before what it depends on."""
        self.time += 1
        changed = list(written)
        for memory in [*read, *changed]:
            if memory.written is not None:
                self._must_follow(*memory.written, "reads what another stream writes")
        for memory in changed:
            for stream, time in memory.read.items():
                self._must_follow(stream, time, "overwrites what another stream reads")
            memory.written, memory.read = (self, self.time), {}
        for memory in read:
            memory.read[self] = self.time

    def _must_follow(self, stream: Stream, time: int, mistake: str) -> None:
        if stream is not self and self.seen.get(stream, 0) < time:
            raise RuntimeError(f"a stream {mistake}, without waiting for it")


class Event:
    """A point in a stream's time."""

    def __init__(self, **settings: object) -> None:
        self.seen: dict[Stream, int] = {}

    def record(self, stream: Stream) -> None:
        self.seen = {**stream.seen, stream: stream.time}


DEFAULT = Stream()
"""Where operations go unless told otherwise; the same for all emulated devices of a process, which may share tensors
that klab keeps."""
