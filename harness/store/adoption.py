"""Taking finished cells over from another run: same ids, made from the same code, data and models."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klab.grid import Cell
from klab.harness.store import code, inputs
from klab.harness.store.run import Run


@dataclass
class Adoption:
    """Ids of the cells that were taken over; and of those that were not, with what differs."""

    adopted: list[str] = field(default_factory=list)
    different: dict[str, list[str]] = field(default_factory=dict)


def adopt(run: Run, other: Run) -> Adoption:
    """Copy the folders of cells that `other` has finished and `run` has neither finished nor in work.

    Raises:
        OSError: when a folder cannot be copied; what was copied before stays.
    """
    found = Adoption()
    with run.lock("adopting cells"):
        for identity in run.cells:
            if identity not in other.manifest["cells"] or other.cell(identity).result() is None:
                continue
            if run.cell(identity).result() is not None or run.cell(identity).claim_holder() is not None:
                continue
            different = _differences(run.cell(identity).cell(), run, other)
            if different:
                found.different[identity] = different
                continue
            _copy(other.cell(identity).path, run.cell(identity).path)
            found.adopted.append(identity)
    return found


def _differences(cell: Cell, run: Run, other: Run) -> list[str]:
    """Code, data and models of this cell that the two runs have in different versions, or one has not recorded."""
    mine, theirs = run.made_with(cell.id), other.made_with(cell.id)
    names = {"code": code.names([cell]), "inputs": inputs.labels([cell])}
    return [
        name
        for kind, used in names.items()
        for name in used
        if _contents(mine.get(kind, {}).get(name)) != _contents(theirs.get(kind, {}).get(name))
    ]


def _contents(record: Mapping[str, Any] | None) -> object:
    if record is None:
        return None
    return record.get("files") or record.get("sha256") or record.get("commit")


def _copy(source: Path, target: Path) -> None:
    """Copy the regular files of a cell, the result last of all, so that a cell is finished when it is whole."""
    if target.exists():
        shutil.rmtree(target)
    files = sorted(
        (file for file in source.rglob("*") if file.is_file() and not file.is_symlink()),
        key=lambda file: file.name == "result.json",
    )
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
