"""What jobs printed, as far as it lies in the run folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from klab.grid import UserError
from klab.harness.store.inside import open_inside
from klab.harness.store.run import Run

_CHUNK = 1 << 18


def job_output(run: Run, events: Iterable[Mapping[str, Any]], lines: int) -> dict[str, str]:
    """By path below the run folder, the last lines of standard output and of standard error of a cell's newest job.

    Args:
        events: the cell's attempts; a file that they name is shown only where it is reached through no link.
    """
    named = [event["log"] for event in events if isinstance(event.get("log"), str) and event["log"]]
    if not named:
        return {}
    try:
        error = Path(os.path.normpath(run.path / named[-1])).relative_to(run.path)
    except ValueError:
        return {}
    found = {str(path): tail(run.path, path, lines) for path in (error.with_suffix(".out"), error)}
    return {path: text for path, text in found.items() if text is not None}


def tail(root: Path, path: Path, lines: int) -> str | None:
    """The last lines of a text file below `root`; None where there is no such file, or it is reached through a link."""
    try:
        with open_inside(root, path.parts) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _CHUNK))
            return "\n".join((file.read(_CHUNK) or b"").decode(errors="replace").splitlines()[-lines:])
    except (OSError, UserError):
        return None
