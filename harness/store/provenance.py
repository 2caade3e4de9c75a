"""Which code, data and models the cells of a run were made with, and what of these is different now.

The manifest has the records `code` and `inputs` of what the run uses now, and in `superseded` those that finished cells
were made with before a launch accepted changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from klab.grid import UserError
from klab.harness.store import files

Manifest = Mapping[str, Any]


def changed(manifest: Manifest, run: Path, identity: str | None = None, missing: bool = True) -> list[str]:
    """Code, data and models that are not what the run in this folder, or one cell of it, was made with.

    Args:
        missing: count what is gone, too.
    """
    from klab.harness.store import code, inputs

    made = made_with(manifest, run, identity)
    file = run / "manifest.json"
    code.check(made.get("code", {}), file)
    inputs.check(made.get("inputs", {}), file)
    return [
        *code.changed(made.get("code", {}), run, missing),
        *inputs.changed(made.get("inputs", {}), run, missing),
    ]


def earlier(manifest: Manifest, run: Path) -> dict[str, list[str]]:
    """Cells that were finished with other code, data or models than the run has now, and what is different."""
    found: dict[str, list[str]] = {}
    for each in _superseded(manifest, run):
        for identity in each["cells"]:
            found.setdefault(str(identity), [str(name) for name in each["changed"]])
    return found


def made_with(manifest: Manifest, run: Path, identity: str | None = None) -> Mapping[str, Any]:
    """The records `code` and `inputs` of the run, or of a cell that was finished before they were others."""
    found = (each for each in _superseded(manifest, run) if identity in each["cells"])
    return next(found, manifest) if identity is not None else manifest


def refuse_changes(changed: Sequence[str], path: Path) -> None:
    """Raises UserError where something has changed and cells are to be added."""
    if changed:
        raise UserError(
            f"was made with other versions of {', '.join(changed)}: cells that are added now would not be comparable",
            file=path,
            hint="Give the grid another name, or choose another place with --runs; --accept-changes adds the cells all "
            "the same, and the report says so.",
        )


def _superseded(manifest: Manifest, run: Path) -> list[Mapping[str, Any]]:
    found = manifest.get("superseded", [])
    if not isinstance(found, list) or not all(
        isinstance(each, Mapping) and all(isinstance(each.get(key), list) for key in ("cells", "changed"))
        for each in found
    ):
        raise files.damaged_file(run / "manifest.json", "has no valid 'superseded'")
    return found
