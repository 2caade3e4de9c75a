"""A time limit for a call into somebody else's code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Overdue(Exception):
    """The call did not return in time."""


@contextmanager
def deadline(seconds: float) -> Iterator[Callable[[], None]]:
    """Raises `Overdue` inside the block once it has taken `seconds`, counted anew from each call of what it yields.

    Works in the main thread, between two bytecodes or in a system call that a signal interrupts (sleeping, waiting for
    a lock or a socket); elsewhere, and inside a library's own loops, there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise Overdue(f"no answer within {seconds:g} s")

    def restart() -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    before = signal.signal(signal.SIGALRM, ring)
    restart()
    try:
        yield restart
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
