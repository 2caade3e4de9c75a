"""Command-line arguments that commands share, and the grid file, run or cell that they name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import klab.grid
from klab.grid import UserError
from klab.grid.short_ids import matching_ids
from klab.harness.store import Run
from klab.harness.store.archive import Archive, is_archive
from klab.harness.store.cell_folder import CellFolder

if TYPE_CHECKING:
    from klab.grid import Grid

STUDIES = Path(klab.grid.__file__).parent / "studies"

GridArgument = Annotated[str, typer.Argument(metavar="GRID", help="A grid file, or the name of a ready study.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or its name under --runs.")]
CellsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[CELL]...", help="Ids, or parts of them; default: all.")
]
RunsOption = Annotated[Path, typer.Option("--runs", help="The folder that holds run folders.")]


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


DeviceOption = Annotated[
    Device | None,
    typer.Option("--device", help="cpu leaves GPUs alone; cuda insists on one; default: what there is."),
]
DetachOption = Annotated[bool, typer.Option("--detach", help="Return at once; watch with `klab status --watch`.")]
MaxParallelOption = Annotated[int | None, typer.Option(min=1, help="Jobs at a time; default: cores or GPUs.")]
CellsPerJobOption = Annotated[int | None, typer.Option(min=1, help="Cells that one job trains together.")]
ProfileOption = Annotated[str | None, typer.Option(help="Slurm: named profile of your configuration file.")]
DeltaOption = Annotated[
    float | None,
    typer.Option("--delta", help="Differences smaller than this count as none (equivalent); default 0.05.", min=0.0),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

RUNS = Path("runs")


def grid_of(name: str) -> Grid:
    """The grid in a file, or the ready study of that name.

    Raises:
        UserError: when there is neither, or the file has a mistake.
    """
    from klab.grid import load_grid

    path = Path(name)
    study = STUDIES / f"{name}.yaml"
    if not path.exists() and study.exists():
        return load_grid(study)
    if not path.exists():
        studies = sorted(entry.stem for entry in STUDIES.glob("*.yaml"))
        raise UserError("there is no such file, and no study of this name", key="GRID", value=name, allowed=studies)
    return load_grid(path)


def run_of(name: str, runs: Path = RUNS) -> Run:
    """The run in a folder, or of that name under `runs`.

    Raises:
        UserError: when there is no such run.
    """
    for path in (Path(name), runs / name):
        if (path / "manifest.json").exists():
            return Run.open(path)
    if Path(name).suffix in (".yaml", ".yml") and Path(name).is_file():
        raise UserError("is a grid file; this command wants a run", file=name, hint=f"Runs lie in {runs}/.")
    known = sorted(path.parent.name for path in runs.glob("*/manifest.json")) if runs.is_dir() else []
    raise UserError("there is no such run", key="RUN", value=name, allowed=known, hint="`klab launch GRID` makes one.")


def study_of(name: str, runs: Path = RUNS) -> Run:
    """The run or the archive in a folder, or of that name under `runs`.

    Raises:
        UserError: when there is neither.
    """
    for path in (Path(name), runs / name):
        if is_archive(path):
            return Archive.open(path)
    return run_of(name, runs)


def cells_of(run: Run, names: Sequence[str] | None) -> list[str]:
    """The ids of the cells that are named by ids or parts of them; without names, of all cells.

    Raises:
        UserError: when a name fits no cell, or more than one.
    """
    return [run.cell(name).id for name in names] if names else list(run.cells)


def cell_folder_of(name: str, runs: Path, others: Iterable[str]) -> CellFolder:
    """The folder of the cell with this id, or the only one whose id contains it, in any run of a folder.

    Args:
        others: what else the command takes, for the message.

    Raises:
        UserError: when there is none, or more than one.
    """
    homes: dict[str, Run] = {}
    for manifest in sorted(runs.glob("*/manifest.json")) if runs.is_dir() else ():
        run = Run.open(manifest.parent)
        homes.update((identity, run) for identity in run.cells if identity not in homes)
    found = matching_ids(name, homes)
    if len(found) > 1:
        raise UserError(f"{len(found)} cells of the runs in {runs} fit", key="CELL", value=name, allowed=found)
    if not found:
        raise UserError(
            f"is no named algorithm, and no cell of a run in {runs}", key="CELL", value=name, allowed=others
        )
    return homes[found[0]].cell(found[0])
