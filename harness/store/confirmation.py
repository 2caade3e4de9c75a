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
    """What a confirmation says of its exploration: its name, the cells that were chosen, with their means there, or the
    claims with their verdicts, how many cells there were, and the digest of the manifest at that time. None for any
    other run.

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


def default_name(run: Run, claims: bool = False) -> str:
    """What the confirmation of a run is called: that of its best cells, or that of its claims."""
    return f"{run.name}-confirm{'-claims' if claims else ''}"


def confirmations_of(run: Run) -> list[Path]:
    """The folders or archives of the confirmations of this run that lie beside it."""
    paths = [run.path.parent / default_name(run, claims) for claims in (False, True)]
    return [path for path in paths if (path / "manifest.json").is_file() or is_archive(path)]
