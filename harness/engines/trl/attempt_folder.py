"""The folder of one attempt at a cell, by which its processes on all nodes tell one another what the launchers do not.

The first node's process asks for a stop and says when it is done; ranks leave word of why they failed, rank 0 of how
the cell ended. Every file is written at once and never changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from klab.harness.store import files

_STOP, _OVER, _OUTCOME = "stop", "over", "outcome.json"

Kind = Literal["error", "memory", "lost"]
"""A failure of the cell's own, memory that did not suffice, or another process that is gone."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a process gave up."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class AttemptFolder:
    """`path` is seen by all nodes."""

    path: Path

    def request_stop(self) -> None:
        """Ask the ranks to save and end."""
        (self.path / _STOP).touch()

    def stop_requested(self) -> bool:
        """Whether the ranks are to save and end."""
        return (self.path / _STOP).exists()

    def close(self) -> None:
        """Say that the first node has done with the attempt; nobody is there to read it where the folder is gone."""
        with suppress(FileNotFoundError):
            (self.path / _OVER).touch()

    def is_over(self) -> bool:
        """Whether the first node has done with the attempt."""
        return (self.path / _OVER).exists()

    def leave_failure(self, who: str, kind: Kind, text: str) -> None:
        """Leave word of why a process failed. Where that cannot be written, the job's log has it."""
        record = json.dumps(asdict(Failure(kind, text))).encode()
        with suppress(OSError):
            files.replace(self.path / f"failure-{who}.json", record, durable=False)

    def failures(self) -> Iterator[Failure]:
        """What processes have left, by their names."""
        for path in sorted(self.path.glob("failure-*.json")):
            yield Failure(**json.loads(path.read_text()))

    def leave_outcome(self, state: str) -> None:
        """Say how the cell ended: rank 0."""
        files.replace(self.path / _OUTCOME, json.dumps({"state": state}).encode())

    def outcome(self) -> str | None:
        """How the cell ended; None where rank 0 has not said it."""
        with suppress(FileNotFoundError):
            return str(json.loads((self.path / _OUTCOME).read_text())["state"])
        return None
