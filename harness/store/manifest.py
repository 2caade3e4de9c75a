"""The manifest of a run: built from a grid, compared with another grid, and checked when it is read."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.grid import UserError
from klab.grid.accelerate_file import launcher_kind
from klab.grid.libraries import libraries
from klab.harness.store import files, looks, machine, provenance, stated_analysis, stated_claims, tuning
from klab.harness.store.record_table import decode_table, encode_table, read_table

if TYPE_CHECKING:
    from klab.grid import Grid

GROWN = "grown"
"""Ids of cells that the run got after a launch, and that no grid file need have."""
CELL_ID = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,254}")
_NAME = re.compile(r"[\w-][\w.-]{0,99}")
_TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "grid": str,
    "cells": Mapping,
    "axes": dict,
    "seeds": list,
    "resources": dict,
    "created": (int, float),
    "versions": dict,
    "hardware": dict,
    "baseline": (str, type(None)),
}
_CUTS = ("objective", "task", "policy", "training", "seed")
"""Consecutive entries of a cell; most cells share the values of all but the last."""
KEPT = ("analysis", "claims", "looks", "most_seeds", "extended", "confirms", GROWN)
"""What the manifest keeps from launch to launch beside its cells."""


def read_manifest(file: Path) -> dict[str, Any] | None:
    """The manifest in this file, whose cells are parsed when they are asked for; None when there is no such file.

    Raises:
        UserError: it is damaged or of another schema.
    """
    manifest = read_table(file, "cells", _CUTS)
    if manifest is not None:
        _check(manifest, file)
    return manifest


def decode_manifest(data: bytes, file: Path) -> dict[str, Any]:
    """The manifest in this text, which stood in `file`.

    Raises:
        UserError: it is damaged or of another schema.
    """
    manifest = decode_table(data, "cells", _CUTS, file)
    _check(manifest, file)
    return manifest


def cells_of(grid: Grid) -> dict[str, dict[str, Any]]:
    """What the manifest says of each cell, by id."""
    return {cell.id: {**cell.resolved(), "group": cell.group} for cell in grid.cells}


def build_manifest(
    grid: Grid, existing: dict[str, Any] | None, path: Path, created: float | None, accept_changes: bool
) -> dict[str, Any]:
    """The manifest of `grid` in the run folder `path`: `existing` itself where the grid changes nothing in it.

    The stated analysis and claims are recorded with every change that they ever have, and so is every number of seeds
    per cell.

    Args:
        created: the time of the creation in seconds since 1970; None: that of `existing`, else now.
        accept_changes: add or continue cells although code, data or models are not those that the run was made with.

    Raises:
        UserError: the folder belongs to another grid, or cells would be added under changed code, data or models.
    """
    manifest = _manifest(grid, existing, path, created, accept_changes)

    def results() -> int:
        return 0 if existing is None else sum(_is_finished(path, identity) for identity in existing["cells"])

    manifest = looks.recorded(manifest, existing, results)
    manifest = stated_claims.recorded(manifest, existing, grid, results)
    return stated_analysis.recorded(manifest, existing, grid, results)


def _manifest(
    grid: Grid, existing: dict[str, Any] | None, path: Path, created: float | None, accept_changes: bool
) -> dict[str, Any]:
    cells = cells_of(grid)
    superseded: list[Any] = []
    tuned = tuning.record_of(grid)
    if existing is None:
        made = _made_with(grid, {}, path)
    else:
        refuse_other_grid(grid, existing, cells, path)
        known = launched_cells(existing)
        fewer, adds = cells.keys() < known.keys(), not cells.keys() <= existing["cells"].keys()
        changed: list[str] = []
        if adds or (accept_changes and any(not _is_finished(path, identity) for identity in cells)):
            changed = provenance.changed(existing, path, missing=adds)
        if not changed and (fewer or (known == cells and existing["grid"] == grid.text)):
            return existing
        if changed and not accept_changes:
            provenance.refuse_changes(changed, path)
        superseded = list(existing.get("superseded", []))
        if changed:
            superseded = provenance.supersede(existing, changed, path)
        made = _made_with(grid, existing, path, renew=bool(changed))
        if fewer:
            return {**existing, **made, "superseded": superseded}
    return {
        "name": grid.name,
        "description": grid.description,
        "created": existing["created"] if existing else time.time() if created is None else created,
        "versions": machine.versions(_libraries(grid, cells)),
        "commit": machine.commit(Path.cwd()),
        "hardware": machine.hardware(),
        "baseline": grid.baseline,
        "design": grid.design,
        **(
            {"fraction": {"candidates": grid.fraction.candidates, "held_out": list(grid.fraction.held_out)}}
            if grid.fraction
            else {}
        ),
        "axes": {name: list(values) for name, values in grid.axes.items()},
        "seeds": list(dict.fromkeys([*grid.seeds, *(existing or {}).get("extended", ())])),
        "track": list(grid.track),
        "resources": grid.resources.model_dump(mode="json"),
        **({} if grid.notify is None else {"notify": grid.notify.model_dump(mode="json", exclude_none=True)}),
        **({} if grid.budget is None else {"budget": grid.budget.model_dump(mode="json", exclude_none=True)}),
        "equalities": [
            {"runs": each.runs, "merged": list(each.merged), "groups": list(each.groups)} for each in grid.equalities
        ],
        "grid": grid.text,
        **({} if tuned is None else {"tuning": tuned}),
        **({} if grid.evaluations is None else {"evaluate": grid.evaluations.model_dump(mode="json")}),
        **{key: existing[key] for key in KEPT if existing and key in existing},
        **made,
        "superseded": superseded,
        "cells": {**cells, **_grown_cells(existing)},
    }


def _libraries(grid: Grid, cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The optional libraries that some of these cells use."""
    kind = launcher_kind(grid.resources.launcher)
    return list(dict.fromkeys(name for cell in cells.values() for name in libraries(cell, kind)))


def launched_cells(manifest: Mapping[str, Any]) -> Mapping[str, dict[str, Any]]:
    """The cells that come from a grid file: all but those that the run got after a launch."""
    cells: Mapping[str, dict[str, Any]] = manifest["cells"]
    grown = set(manifest.get(GROWN, ()))
    return {identity: cells[identity] for identity in cells if identity not in grown} if grown else cells


def grown(manifest: dict[str, Any], cells: Mapping[str, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """The manifest with more cells, and with what else changes with them."""
    more = [identity for identity in cells if identity not in manifest["cells"]]
    return {
        **manifest,
        **changes,
        GROWN: [*manifest.get(GROWN, []), *more],
        "cells": {**manifest["cells"], **{identity: cells[identity] for identity in more}},
    }


def _grown_cells(existing: Mapping[str, Any] | None) -> dict[str, Any]:
    return {identity: existing["cells"][identity] for identity in existing.get(GROWN, ())} if existing else {}


def _made_with(grid: Grid, existing: Mapping[str, Any], path: Path, renew: bool = False) -> dict[str, Any]:
    """The records `code` and `inputs` of the run: those of `existing`, and what the grid names beside it.

    Args:
        renew: record everything as it is now, but for what is gone.
    """
    from klab.grid import user_code
    from klab.harness.store import code, inputs

    known, known_inputs = existing.get("code", {}), existing.get("inputs", {})
    named = inputs.record(grid.cells, path)
    if renew:
        with user_code.searching(Path(grid.file).parent):
            used = code.record(dict.fromkeys([*known, *code.names(grid.cells)]), path)
        return {"code": {**known, **used}, "inputs": {**inputs.renewed(known_inputs, path), **named}}
    with user_code.searching(Path(grid.file).parent, code.locations(known, path)):
        used = code.record((name for name in code.names(grid.cells) if name not in known), path)
    return {"code": {**known, **used}, "inputs": {**named, **known_inputs}}


def _is_finished(run: Path, identity: str) -> bool:
    return (run / "cells" / identity / "result.json").exists()


def refuse_other_grid(grid: Grid, existing: dict[str, Any], cells: dict[str, dict[str, Any]], path: Path) -> None:
    """Raises UserError, naming a difference, where the grid both leaves out and adds cells, or has another name."""
    if existing["name"] != grid.name:
        raise UserError(
            f"belongs to the grid {existing['name']!r}, not {grid.name!r}",
            file=path,
            hint="Choose another place with --runs.",
        )
    tuning.refuse_other_settings(tuning.record_of(grid), path)
    known = launched_cells(existing)
    missing = [identity for identity in known if identity not in cells]
    if missing and not all(identity in existing["cells"] for identity in cells):
        raise UserError(
            f"belongs to another grid of the same name: {len(missing)} of its {len(known)} cells are "
            f"not in {grid.file}, for example {_difference(known[missing[0]], cells)}",
            file=path,
            hint="Cells and seeds may be added to a grid that was launched, or left out, not both at once; for other "
            "changes give it a new name, or choose another place with --runs.",
        )


def _difference(old: dict[str, Any], cells: dict[str, dict[str, Any]]) -> str:
    """Where a vanished cell differs from the nearest cell of the grid file."""
    before = _flat(old)
    best: dict[str, tuple[Any, Any]] | None = None
    for new in cells.values():
        after = _flat(new)
        changes = {
            key: (before.get(key), after.get(key))
            for key in before.keys() | after.keys()
            if before.get(key) != after.get(key)
        }
        if best is None or len(changes) < len(best):
            best = changes
    if not best:
        return str(old.get("id"))
    shown = ", ".join(f"{key} was {was!r}, now {now!r}" for key, (was, now) in sorted(best.items())[:4])
    return f"{old.get('id')}: {shown}"


def _flat(resolved: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {"seed": resolved.get("seed")}
    for section in ("objective", "task", "policy", "training"):
        for key, value in dict(resolved.get(section) or {}).items():
            flat[f"{section}.{key}"] = value
    return flat


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """One line per cell, so that ten thousand of them stay readable and quick to load."""
    head = {key: value for key, value in manifest.items() if key != "cells"}
    return encode_table(head, "cells", manifest["cells"])


def _check(manifest: dict[str, Any], file: Path) -> None:
    for key, kind in _TYPES.items():
        if key not in manifest or not isinstance(manifest[key], kind):
            raise files.damaged_file(file, f"has no valid {key!r}")
    if not _NAME.fullmatch(manifest["name"]):
        raise files.damaged_file(file, f"has the name {manifest['name'][:80]!r}, which no grid file can have")
    for identity in manifest["cells"]:
        if not CELL_ID.fullmatch(identity):
            raise files.damaged_file(file, f"names a cell {identity[:80]!r}, which cannot be a folder")
