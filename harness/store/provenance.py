"""Which code, data and models the cells of a run were made with, and what of these is different now.

The manifest has the records `code` and `inputs` of what the run uses now. Each time that a launch accepted changes,
`superseded` got an entry with the records from before, the ids of the cells that were finished with these (`cells`) or
begun (`begun`), and what was different then (`changed`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from klab.grid import UserError
from klab.harness.store import files

Manifest = Mapping[str, Any]


def changed(
    manifest: Manifest, run: Path, identity: str | None = None, missing: bool = True, bounded: bool = False
) -> list[str]:
    """Code, data and models that are not what the run in this folder, or one cell of it, was made with.

    Args:
        missing: count what is gone, too.
        bounded: the run may be a stranger's: read no more than `inputs.Digests` does then.
    """
    from klab.harness.store import code, inputs

    made = made_with(manifest, run, identity)
    file = run / "manifest.json"
    code.check(made.get("code", {}), file)
    inputs.check(made.get("inputs", {}), file)
    return [
        *code.changed(made.get("code", {}), run, missing),
        *inputs.changed(made.get("inputs", {}), run, missing, bounded),
    ]


def earlier(manifest: Manifest, run: Path) -> dict[str, list[str]]:
    """Cells that were finished with other code, data or models than the run has now, and what is different."""
    found: dict[str, list[str]] = {}
    for each in _superseded(manifest, run):
        for identity in each["cells"]:
            found.setdefault(str(identity), [str(name) for name in each["changed"]])
    return found


def begun_earlier(manifest: Manifest, run: Path) -> dict[str, list[str]]:
    """Cells that were begun with other code, data or models and went on with those of now, and what was different."""
    found: dict[str, list[str]] = {}
    for each in _superseded(manifest, run):
        for identity in each.get("begun", []):
            found.setdefault(str(identity), []).extend(str(name) for name in each["changed"])
    return found


def supersede(manifest: Manifest, changes: Sequence[str], run: Path) -> list[Mapping[str, Any]]:
    """The entries `superseded` of the manifest that follows this one when these changes are accepted."""
    done, begun = [], []
    for identity in manifest["cells"]:
        folder = run / "cells" / identity
        if (folder / "result.json").exists():
            done.append(identity)
        elif (folder / "checkpoint").exists() or (folder / "claim").exists():
            begun.append(identity)
    records = {"code": manifest.get("code", {}), "inputs": manifest.get("inputs", {})}
    return [*_superseded(manifest, run), {"cells": done, "begun": begun, "changed": list(changes), **records}]


def changed_data(manifest: Manifest, run: Path, cells: Iterable[str]) -> dict[str, list[str]]:
    """Which of these cells name data or models that are no longer what the run has recorded, and which these are.

    Code is left out: a changed file of the user's is not used, but the run's copy of it. What is gone is left out, too:
    it cannot be loaded.
    """
    from klab.harness.store import inputs

    records = manifest.get("inputs", {})
    inputs.check(records, run / "manifest.json")
    changes = inputs.changed(records, run, missing=False)
    if not changes:
        return {}
    used = {identity: inputs.used_by(manifest["cells"][identity]) for identity in cells}
    found = {identity: [label for label in changes if label in labels] for identity, labels in used.items()}
    return {identity: labels for identity, labels in found.items() if labels}


def made_with(manifest: Manifest, run: Path, identity: str | None = None) -> Mapping[str, Any]:
    """The records `code` and `inputs` of the run, or of a cell that was finished before they were others."""
    found = (each for each in _superseded(manifest, run) if identity in each["cells"])
    return next(found, manifest) if identity is not None else manifest


def refuse_changes(changes: Sequence[str], run: Path, cells: str = "cells that are added now") -> None:
    """Raises UserError where something has changed and cells are to be added or trained.

    Args:
        cells: which, as the subject of a sentence.
    """
    if changes:
        raise UserError(
            f"was made with other versions of {', '.join(changes)}: {cells} would not be comparable",
            file=run,
            hint="Put the versions from before back, give the grid another name, or choose another place with --runs; "
            "`klab launch GRID --accept-changes` trains the cells all the same, and the report says so.",
        )


def _superseded(manifest: Manifest, run: Path) -> list[Mapping[str, Any]]:
    found = manifest.get("superseded", [])
    if not isinstance(found, list) or not all(
        isinstance(each, Mapping)
        and all(isinstance(each.get(key), list) for key in ("cells", "changed"))
        and isinstance(each.get("begun", []), list)
        for each in found
    ):
        raise files.damaged_file(run / "manifest.json", "has no valid 'superseded'")
    return found
