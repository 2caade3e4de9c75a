"""A run folder: its grid, the manifest of its cells, and the paths of everything in it. It holds no absolute path."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.grid import UserError
from klab.grid.short_ids import matching_ids
from klab.harness.store import files, machine
from klab.harness.store.cell_folder import CellFolder
from klab.harness.store.lock import Lock
from klab.harness.store.manifest import encode_table, read_table

if TYPE_CHECKING:
    from klab.grid import Grid
    from klab.grid.schema.sections import Resources
    from klab.grid.user_code import Location

_ID = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,254}")
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
_LOCK_WAIT = 60.0


class Run:
    """An opened run folder; see `Run.create` and `Run.open`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._folders = path / "cells"

    @classmethod
    def create(cls, path: str | Path, grid: Grid, created: float | None = None, accept_changes: bool = False) -> Run:
        """The run of `grid` in the folder `path`; an existing one is continued, and gets the grid's new cells.

        A grid that has only some of the run's cells leaves the run as it is.

        Args:
            created: the time to record as that of the creation, for a run that repeats another's cells; None: now.
            accept_changes: add cells although code, data or models are not those that the run was made with.

        Raises:
            UserError: when the folder belongs to another grid (the message says how they differ), or is not klab's.
            OSError: when the folder cannot be written.
        """
        path = Path(path).resolve()
        _require_run_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        with Lock(path / "lock", purpose="creating the run", wait=_LOCK_WAIT):
            existing = cls.open(path).manifest if (path / "manifest.json").exists() else None
            manifest = _manifest(grid, existing, path, created, accept_changes)
            if manifest is not existing:
                files.replace(path / "grid.yaml", grid.text.encode())
                files.replace(path / "manifest.json", _manifest_text(manifest))
        return cls(path, manifest)

    @classmethod
    def check_grid(cls, path: str | Path, grid: Grid, accept_changes: bool = False) -> None:
        """Raises UserError, as `create` would, where the run of `grid` cannot be at `path`. Writes nothing."""
        path = Path(path).resolve()
        _require_run_folder(path)
        if (path / "manifest.json").exists():
            run = cls.open(path)
            cells = {cell.id: {**cell.resolved(), "group": cell.group} for cell in grid.cells}
            _refuse_other(grid, run.manifest, cells, path)
            if not accept_changes and not cells.keys() <= run.manifest["cells"].keys():
                _refuse_changes(run.changed_inputs(), path)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in the folder `path`, for reading or for working on its cells.

        Raises:
            UserError: when it is not a run folder, or its manifest is damaged or of another schema.
        """
        path = Path(path).resolve()
        file = path / "manifest.json"
        manifest = read_table(file, "cells", _CUTS)
        if manifest is None:
            problem = (
                "is not a run folder (it has no manifest.json)" if path.is_dir() else "there is no such run folder"
            )
            raise UserError(problem, file=path, hint="`klab launch GRID` makes one under runs/.")
        _check_manifest(manifest, file)
        return cls(path, manifest)

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def created(self) -> float:
        """When the run was created, in seconds since 1970; also the date that chat templates print."""
        return float(self.manifest["created"])

    @property
    def grid_text(self) -> str:
        """The grid file as given."""
        return str(self.manifest["grid"])

    @property
    def cells(self) -> list[str]:
        """Ids of all cells, in the grid's order."""
        return list(self.manifest["cells"])

    @property
    def baseline(self) -> str | None:
        """Group of the unchanged configuration."""
        return self.manifest["baseline"]  # type: ignore[no-any-return]

    @property
    def resources(self) -> Resources:
        """What the grid file asks for each job."""
        from klab.grid.schema.sections import load_section

        try:
            return load_section("resources", self.manifest["resources"])  # type: ignore[return-value]
        except UserError as error:
            raise error.with_location(file=self.path / "manifest.json") from None

    def cell(self, identity: str) -> CellFolder:
        """The folder of the cell with this id, or of the only one whose id has this part.

        Raises:
            UserError: when there is none, or more than one.
        """
        if identity not in self.manifest["cells"]:
            identity = self._only(identity)
        return CellFolder(self._folders / identity, identity, lambda: self.resolved(identity))

    def resolved(self, identity: str) -> dict[str, Any]:
        """All settings of a cell, as plain data."""
        record = self.manifest["cells"][identity]
        if not isinstance(record, dict):
            raise files.damaged_file(self.path / "manifest.json", f"does not describe the cell {identity}")
        group, seed = record.get("group"), record.get("seed")
        if not isinstance(group, str) or not _ID.fullmatch(group) or not isinstance(seed, int):
            raise files.damaged_file(self.path / "manifest.json", f"does not say which configuration {identity} has")
        return record

    def output_folder(self, *names: str) -> Path:
        """A folder in the run for what is written beside the cells, for example ``report``; it need not exist.

        Raises:
            UserError: it is a link, through which a run folder from elsewhere could have files written anywhere.
        """
        folder = self.path
        for name in names:
            folder = folder / name
            if folder.is_symlink():
                raise UserError("is a link: nothing is written through it", file=folder, hint="Remove it.")
        return folder

    def user_code(self, identity: str | None = None) -> dict[str, Location]:
        """Where each name of user code in the grid is to be loaded from; see `klab.harness.store.code`.

        Args:
            identity: the cell whose code is wanted, which may be older than that of cells added later.
        """
        from klab.harness.store import code

        records = self.made_with(identity).get("code", {})
        code.check(records, self.path / "manifest.json")
        return code.locations(records, self.path)

    def changed_inputs(self, identity: str | None = None, missing: bool = True) -> list[str]:
        """Code, data and models that are not what the run, or one cell of it, was made with.

        Args:
            missing: count what is gone, too.
        """
        from klab.harness.store import code, inputs

        made = self.made_with(identity)
        file = self.path / "manifest.json"
        code.check(made.get("code", {}), file)
        inputs.check(made.get("inputs", {}), file)
        return [
            *code.changed(made.get("code", {}), self.path, missing),
            *inputs.changed(made.get("inputs", {}), self.path, missing),
        ]

    def earlier_inputs(self) -> dict[str, list[str]]:
        """Cells that were finished with other code, data or models than the run has now, and what is different."""
        found: dict[str, list[str]] = {}
        for each in self._superseded():
            for identity in each["cells"]:
                found.setdefault(str(identity), [str(name) for name in each["changed"]])
        return found

    def made_with(self, identity: str | None = None) -> Mapping[str, Any]:
        """The records `code` and `inputs` of the run, or of a cell that was finished before they were others."""
        earlier = (each for each in self._superseded() if identity in each["cells"])
        return next(earlier, self.manifest) if identity is not None else self.manifest

    def _superseded(self) -> list[Mapping[str, Any]]:
        found = self.manifest.get("superseded", [])
        if not isinstance(found, list) or not all(
            isinstance(each, Mapping) and all(isinstance(each.get(key), list) for key in ("cells", "changed"))
            for each in found
        ):
            raise files.damaged_file(self.path / "manifest.json", "has no valid 'superseded'")
        return found

    @property
    def policies(self) -> Path:
        """Shared starting policies, by content."""
        return self.path / "policies"

    @property
    def jobs(self) -> Path:
        """Submission records and logs of jobs."""
        return self.path / "jobs"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def lock(self, purpose: str = "launching", wait: float = _LOCK_WAIT) -> Lock:
        """The lock for whoever submits jobs; a context manager."""
        return Lock(self.path / "lock", purpose=purpose, wait=wait)

    def _only(self, part: str) -> str:
        cells: Mapping[str, Any] = self.manifest["cells"]
        found = matching_ids(part, cells)
        if len(found) == 1:
            return found[0]
        problem = "no such cell" if not found else f"{len(found)} cells fit"
        raise UserError(problem, file=self.path, key="cell", value=part, allowed=found or cells)


def _manifest(
    grid: Grid, existing: dict[str, Any] | None, path: Path, created: float | None, accept_changes: bool
) -> dict[str, Any]:
    from klab.grid import user_code
    from klab.harness.store import code, inputs

    cells = {cell.id: {**cell.resolved(), "group": cell.group} for cell in grid.cells}
    known: dict[str, Any] = {}
    known_inputs: dict[str, Any] = {}
    superseded: list[Any] = []
    if existing is not None:
        _refuse_other(grid, existing, cells, path)
        if cells.keys() < existing["cells"].keys() or (existing["cells"] == cells and existing["grid"] == grid.text):
            return existing
        known, known_inputs = existing.get("code", {}), existing.get("inputs", {})
        run = Run(path, existing)
        superseded = list(existing.get("superseded", []))
        if changed := run.changed_inputs():
            if not accept_changes:
                _refuse_changes(changed, path)
            done = [each for each in existing["cells"] if (path / "cells" / each / "result.json").exists()]
            superseded.append({"cells": done, "changed": changed, "code": known, "inputs": known_inputs})
            known, known_inputs = {}, {}
    with user_code.searching(Path(grid.file).parent, code.locations(known, path)):
        used = code.record((name for name in code.names(grid.cells) if name not in known), path)
    return {
        "name": grid.name,
        "description": grid.description,
        "created": existing["created"] if existing else time.time() if created is None else created,
        "versions": machine.versions(),
        "commit": machine.commit(Path.cwd()),
        "hardware": machine.hardware(),
        "baseline": grid.baseline,
        "design": grid.design,
        "axes": {name: list(values) for name, values in grid.axes.items()},
        "seeds": list(grid.seeds),
        "track": list(grid.track),
        "resources": grid.resources.model_dump(mode="json"),
        "equalities": [
            {"runs": each.runs, "merged": list(each.merged), "groups": list(each.groups)} for each in grid.equalities
        ],
        "grid": grid.text,
        "code": {**known, **used},
        "inputs": {**inputs.record(grid.cells, path), **known_inputs},
        "superseded": superseded,
        "cells": cells,
    }


def _refuse_changes(changed: Sequence[str], path: Path) -> None:
    if changed:
        raise UserError(
            f"was made with other versions of {', '.join(changed)}: cells that are added now would not be comparable",
            file=path,
            hint="Give the grid another name, or choose another place with --runs; --accept-changes adds the cells all "
            "the same, and the report says so.",
        )


def _refuse_other(grid: Grid, existing: dict[str, Any], cells: dict[str, dict[str, Any]], path: Path) -> None:
    if existing["name"] != grid.name:
        raise UserError(
            f"belongs to the grid {existing['name']!r}, not {grid.name!r}",
            file=path,
            hint="Choose another place with --runs.",
        )
    missing = [identity for identity in existing["cells"] if identity not in cells]
    if missing and not all(identity in existing["cells"] for identity in cells):
        raise UserError(
            f"belongs to another grid of the same name: {len(missing)} of its {len(existing['cells'])} cells are "
            f"not in {grid.file}, for example {_difference(existing['cells'][missing[0]], cells)}",
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


def _manifest_text(manifest: dict[str, Any]) -> bytes:
    """One line per cell, so that ten thousand of them stay readable and quick to load."""
    head = {key: value for key, value in manifest.items() if key != "cells"}
    return encode_table(head, "cells", manifest["cells"])


def _check_manifest(manifest: dict[str, Any], file: Path) -> None:
    for key, kind in _TYPES.items():
        if key not in manifest or not isinstance(manifest[key], kind):
            raise files.damaged_file(file, f"has no valid {key!r}")
    if not _NAME.fullmatch(manifest["name"]):
        raise files.damaged_file(file, f"has the name {manifest['name'][:80]!r}, which no grid file can have")
    for identity in manifest["cells"]:
        if not _ID.fullmatch(identity):
            raise files.damaged_file(file, f"names a cell {identity[:80]!r}, which cannot be a folder")


def _require_run_folder(path: Path) -> None:
    """Raises UserError where something else than a run is at this path."""
    if path.exists() and not path.is_dir():
        raise UserError("is not a folder, hence not a place for a run", file=path)
    if path.is_dir() and not (path / "manifest.json").exists() and _foreign(path):
        raise UserError("is a folder with other files, not a run folder", file=path, hint="Choose another with --runs.")


def _foreign(path: Path) -> bool:
    return any(
        entry.name not in ("lock", "grid.yaml", "policies", "code") and not entry.name.startswith(".")
        for entry in path.iterdir()
    )
