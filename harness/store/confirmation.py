"""What the manifest of a run says where the run confirms another one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from klab.harness.store import files
from klab.harness.store.archive import is_archive
from klab.harness.store.run import Run

KEY = "confirms"


def confirms(run: Run) -> Mapping[str, Any] | None:
    """What a confirmation says of its exploration: its name, the cells that were chosen, with their means there, how
    many there were, the score, and the digest of the manifest at that time. None for any other run.

    Raises:
        UserError: the record is damaged.
    """
    record = run.manifest.get(KEY)
    if record is None:
        return None
    sound = isinstance(record, dict) and isinstance(record.get("run"), str) and isinstance(record.get("cells"), dict)
    if not sound:
        raise files.damaged_file(run.path / "manifest.json", "does not say what it confirms")
    return dict(record)


def default_name(run: Run) -> str:
    """What the confirmation of a run is called."""
    return f"{run.name}-confirm"


def confirmation_of(run: Run) -> Path | None:
    """The folder or the archive of the confirmation of this run that lies beside it; None where there is none."""
    path = run.path.parent / default_name(run)
    return path if (path / "manifest.json").is_file() or is_archive(path) else None
