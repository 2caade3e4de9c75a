"""Sends a run's curves and results to trackers while `launch` or `watch` shows its progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

from klab.grid import UserError
from klab.grid.user_code import is_installed
from klab.harness.store import Run

EVERY_SECONDS = 20.0


class Tracking:
    """Follows a run for the trackers named: those of the user's own grid file, or of `--track`.

    What a run folder says of trackers is never followed: it may come from a stranger, and sending is not reading. A
    tracker that fails is said once, and tried again at the next look.
    """

    def __init__(self, run: Run, names: Iterable[str]) -> None:
        self._run = run
        self.names = tuple(names)
        self._sent = -EVERY_SECONDS
        self._said: set[str] = set()

    def tick(self) -> None:
        """Send what is new, if the last time is some seconds ago."""
        if self.names and time.monotonic() - self._sent >= EVERY_SECONDS:
            self.finish()

    def finish(self) -> None:
        """Send what is new."""
        for name in self.names:
            from klab.reports.track import follow

            try:
                follow(self._run, name)
            except Exception as error:  # whatever a tracker's package raises: the cells go on
                self._say(name, error)
        self._sent = time.monotonic()

    def _say(self, name: str, error: Exception) -> None:
        if name not in self._said:
            self._said.add(name)
            said = str(error).strip().splitlines()[:1] or [type(error).__name__]
            print(f"klab: {name} could not be sent to: {said[0]}. The cells go on", file=sys.stderr, flush=True)


def require_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that are not installed, before anything is launched."""
    for name in names:
        if not is_installed(name):
            raise UserError("is not installed", key="track", value=name, hint="pip install 'klab[track]'")
