"""`klab rerun` of an archive's cell: digests compared, and where they differ, how far the numbers are apart."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from klab.grid import UserError
from klab.harness.cli.arguments import Device
from klab.harness.cli.repetition import repeat
from klab.harness.cli.text import say, show_json
from klab.harness.store.archive import Archive

if TYPE_CHECKING:
    from klab.reports.archived_cell import Deviation


def rerun_archived(
    archive: Archive, name: str, settings: Sequence[str], keep: Path | None, device: Device | None, as_json: bool
) -> None:
    """Train a cell of an archive again and say whether its numbers are the archived ones.

    Raises:
        UserError: there is no such cell, it has no result or needs code of the user's, or settings are to be changed.
        Exit: with code 1, the cell failed or the numbers differ.
    """
    from klab.reports.archived_cell import archived_cell, deviation

    cell = archive.cell(name).cell()
    if settings:
        raise UserError("cells of an archive are repeated as they were", key="--set", value=settings[0])
    code = sorted(archive.made_with(cell.id).get("code", {}))
    if code:
        raise UserError(
            f"was trained with code that no archive has: {', '.join(code)}",
            file=archive.path,
            hint="Launch the grid file beside that code instead.",
        )
    stored = archived_cell(archive, cell.id)
    with tempfile.TemporaryDirectory(prefix="klab-rerun-") as scratch:
        folder = repeat(archive, cell, keep or Path(scratch) / "run", device, stored.hardware, quiet=as_json)
        error = folder.error()
        found = None if error is not None else deviation(stored, folder)
    if as_json:
        show_json({"cell": cell.id, "error": error, **({} if found is None else found.as_dict())})
    elif found is None:
        say(str(error))
    else:
        _say(found)
    if found is None or not found.same:
        raise typer.Exit(1)


def _say(found: Deviation) -> None:
    if found.same:
        say(f"The numbers match the archived ones bit for bit (timings excluded): {found.rows}.")
    else:
        say(f"The numbers differ: {found.first}.")
        for line in found.distances:
            say(line)
    for line in found.circumstances:
        say(line)
