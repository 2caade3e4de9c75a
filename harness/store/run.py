"""A run folder: its grid, the manifest of its cells, and the paths of everything in it. It holds no absolute path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.grid import UserError
from klab.grid.accelerate_file import launcher_kind
from klab.grid.libraries import libraries
from klab.grid.short_ids import matching_ids
from klab.harness.store import files, provenance
from klab.harness.store.cell_folder import CellFolder
from klab.harness.store.lock import Lock
from klab.harness.store.manifest import (
    CELL_ID,
    GROWN,
    build_manifest,
    cells_of,
    encode_manifest,
    grown,
    read_manifest,
    refuse_other_grid,
)
from klab.harness.store.tuning import TunedRun, tuned_run

if TYPE_CHECKING:
    from klab.grid import Cell, Grid
    from klab.grid.schema.base import Section
    from klab.grid.schema.budget import Budget
    from klab.grid.schema.evaluate import Evaluations
    from klab.grid.schema.notify import Notify
    from klab.grid.schema.sections import Resources
    from klab.grid.user_code import Location

_LOCK_WAIT = 60.0


class Run:
    """An opened run folder; see `Run.create` and `Run.open`.

    Attributes:
        read_only: whoever looks at the run writes nothing into its folder, not even what saves time when it is looked
            at again.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], read_only: bool = False) -> None:
        self.path = path
        self.manifest = manifest
        self.read_only = read_only
        self._folders = path / "cells"

    @classmethod
    def create(cls, path: str | Path, grid: Grid, created: float | None = None, accept_changes: bool = False) -> Run:
        """The run of `grid` in the folder `path`; an existing one is continued, and gets the grid's new cells.

        A grid that has only some of the run's cells leaves the run as it is.

        Args:
            created: the time to record as that of the creation, for a run that repeats another's cells; None: now.
            accept_changes: add or continue cells although code, data or models are not those that the run was made
                with; from then on the run has those of now.

        Raises:
            UserError: when the folder belongs to another grid (the message says how they differ), or is not klab's.
            OSError: when the folder cannot be written.
        """
        path = Path(path).resolve()
        _require_run_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        with Lock(path / "lock", purpose="creating the run", wait=_LOCK_WAIT):
            existing = cls.open(path).manifest if (path / "manifest.json").exists() else None
            manifest = build_manifest(grid, existing, path, created, accept_changes)
            if manifest is not existing:
                files.replace(path / "grid.yaml", grid.text.encode())
                files.replace(path / "manifest.json", encode_manifest(manifest))
        return cls(path, manifest)

    @classmethod
    def check_grid(cls, path: str | Path, grid: Grid, accept_changes: bool = False) -> None:
        """Raises UserError, as `create` would, where the run of `grid` cannot be at `path`. Writes nothing."""
        path = Path(path).resolve()
        _require_run_folder(path)
        if (path / "manifest.json").exists():
            run = cls.open(path)
            cells = cells_of(grid)
            refuse_other_grid(grid, run.manifest, cells, path)
            if not accept_changes and not cells.keys() <= run.manifest["cells"].keys():
                provenance.refuse_changes(run.changed_inputs(), path)

    @classmethod
    def open(cls, path: str | Path, read_only: bool = False) -> Run:
        """The run in the folder `path`, for reading or for working on its cells.

        Args:
            read_only: looking at its state writes nothing.

        Raises:
            UserError: when it is not a run folder, or its manifest is damaged or of another schema.
        """
        path = Path(path).resolve()
        file = path / "manifest.json"
        manifest = read_manifest(file)
        if manifest is None:
            problem = (
                "is not a run folder (it has no manifest.json)" if path.is_dir() else "there is no such run folder"
            )
            hint = "`klab launch GRID` makes one under runs/."
            if (path / "archive.json").is_file():
                hint = "It is an archive of results, for `klab report`, `compare`, `rerun` and `results`."
            raise UserError(problem, file=path, hint=hint)
        return cls(path, manifest, read_only)

    def refresh(self) -> None:
        """Read the manifest again where the run may have grown since it was opened."""
        if "tuning" in self.manifest:
            self.manifest = read_manifest(self.path / "manifest.json") or self.manifest

    def grow(self, cells: Iterable[Cell], **changes: Any) -> None:
        """Add cells that no launch brought. The caller holds the run's lock.

        Args:
            changes: what else the manifest says from now on.
        """
        self.manifest = grown(
            self.manifest, {cell.id: {**cell.resolved(), "group": cell.group} for cell in cells}, **changes
        )
        files.replace(self.path / "manifest.json", encode_manifest(self.manifest))

    @property
    def grown(self) -> frozenset[str]:
        """Ids of the cells that the run got after a launch."""
        return frozenset(self.manifest.get(GROWN, ()))

    @property
    def tuned(self) -> TunedRun | None:
        """What is tuned; None where the run has one stage."""
        return tuned_run(self.manifest, self.path / "manifest.json")

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
        return self._section("resources")  # type: ignore[return-value]

    @property
    def budget(self) -> Budget | None:
        """The most that the study may use; None: no limit."""
        return self._section("budget") if "budget" in self.manifest else None  # type: ignore[return-value]

    @property
    def notify(self) -> Notify | None:
        """Whom the study tells of its events; None: nobody."""
        return self._section("notify") if "notify" in self.manifest else None  # type: ignore[return-value]

    def _section(self, name: str) -> Section:
        from klab.grid.schema.sections import load_section

        try:
            return load_section(name, self.manifest[name])
        except UserError as error:
            raise error.with_location(file=self.path / "manifest.json") from None

    def libraries(self, identity: str) -> tuple[str, ...]:
        """The optional libraries that a cell uses."""
        return libraries(self.resolved(identity), launcher_kind(self.resources.launcher))

    @property
    def evaluations(self) -> Evaluations | None:
        """What finished policies are evaluated on besides their task; None where the grid file asks for nothing."""
        from klab.grid.schema.sections import load_section

        if self.manifest.get("evaluate") is None:
            return None
        try:
            return load_section("evaluate", self.manifest["evaluate"])  # type: ignore[return-value]
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
        if not isinstance(group, str) or not CELL_ID.fullmatch(group) or not isinstance(seed, int):
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

    def changed_inputs(self, identity: str | None = None, missing: bool = True, bounded: bool = False) -> list[str]:
        """Code, data and models that are not what the run, or one cell of it, was made with.

        Args:
            missing: count what is gone, too.
            bounded: for a run that may be a stranger's: read few files and no unknown large ones.
        """
        return provenance.changed(self.manifest, self.path, identity, missing, bounded)

    def refuse_changed_inputs(self) -> None:
        """Raises UserError, naming them, where code, data or models are there in other versions than the run's."""
        provenance.refuse_changes(self.changed_inputs(missing=False), self.path, "cells that are trained now")

    def changed_data(self, cells: Iterable[str]) -> dict[str, list[str]]:
        """Those of these cells whose data or models are there in other versions than the run's, and which these are."""
        return provenance.changed_data(self.manifest, self.path, cells)

    def earlier_inputs(self) -> dict[str, list[str]]:
        """Cells that were finished with other code, data or models than the run has now, and what is different."""
        return provenance.earlier(self.manifest, self.path)

    def begun_earlier(self) -> dict[str, list[str]]:
        """Cells that were begun with other code, data or models, and went on with the present ones."""
        return provenance.begun_earlier(self.manifest, self.path)

    def made_with(self, identity: str | None = None) -> Mapping[str, Any]:
        """The records `code` and `inputs` of the run, or of a cell that was finished before they were others."""
        return provenance.made_with(self.manifest, self.path, identity)

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

    def gradients_text(self) -> bytes | None:
        """What the exact lab measured of the run's configurations, as JSON; None where it has not.

        Raises:
            UserError: the file is no ordinary one, or too large.
        """
        return files.read_bytes(self.report / "gradients.json")

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
