"""Merging cells that are the same algorithm under their training schedule, so that it is run once."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from klab.grid import Cell, Grid, Objective, UserError
from klab.grid.claims import merged_claims
from klab.grid.grid_file import Equality
from klab.grid.user_code import python_command
from klab.harness.exact.equivalence import contested_fingerprints, equivalence_classes
from klab.harness.store.machine import cache_folder

Progress = Callable[[int, int], None]
"""Called with (objectives measured so far, objectives to measure)."""


@dataclass(frozen=True)
class MergedGrid:
    """A grid with one cell per algorithm, and how many objectives were left unmeasured."""

    grid: Grid
    unmeasured: int


def merge_equivalent(
    grid: Grid, *, keep: Collection[str] = (), at_most: int | None = None, progress: Progress | None = None
) -> MergedGrid:
    """The grid with equivalent cells merged into one, the baseline where it is among them, else the first.

    Objectives that were never measured on this machine are measured in a process of their own, so that this one stays
    free of torch. Cells with the user's own functions are left alone, and so is a grid that tunes the objective.

    Args:
        grid: the grid as written.
        keep: ids of cells that stay even so, because a run already has them.
        at_most: measure only when no more objectives than this are unknown; None: always.
        progress: called while objectives are measured.
    """
    own = [cell for cell in grid.cells if not cell.objective.is_custom]
    if len({(cell.group, cell.training.on_policy) for cell in own}) < 2:
        return MergedGrid(grid, 0)
    if grid.tuning is not None and grid.tuning.changes_algorithms(grid):
        return MergedGrid(grid, 0)
    with tempfile.TemporaryDirectory(prefix="klab-") as scratch:
        cache = _writable(cache_folder(), Path(scratch))
        known, unknown = contested_fingerprints(own, cache=cache)
        if at_most is not None and len(unknown) > at_most:
            return MergedGrid(grid, len(unknown))
        if unknown:
            _measure(unknown, cache, progress)
        found = equivalence_classes(own, cache=cache, known=None if unknown else known)
        classes = [each.members for each in found if len(each.members) > 1]
    return MergedGrid(_with_one_of_each(grid, classes, keep), 0)


def _with_one_of_each(grid: Grid, classes: Sequence[Sequence[Cell]], keep: Collection[str]) -> Grid:
    gone: set[str] = set()
    runs_as: dict[str, str] = {}
    spellings: dict[str, tuple[str, ...]] = {}
    equalities: list[Equality] = []
    for members in classes:
        first = next((cell for cell in members if cell.group == grid.baseline), members[0])
        others = [cell for cell in members if cell.id != first.id]
        gone.update(cell.id for cell in others if cell.id not in keep)
        runs_as.update((cell.group, first.group) for cell in others if cell.id not in keep)
        spellings[first.id] = first.spellings + tuple(word for cell in others for word in cell.spellings)
        equalities.append(
            Equality(first.id, tuple(cell.id for cell in others), tuple(cell.group for cell in (first, *others)))
        )
    cells = tuple(
        replace(cell, spellings=spellings.get(cell.id, cell.spellings)) for cell in grid.cells if cell.id not in gone
    )
    stated = dict.fromkeys(runs_as.get(group, group) for group in grid.stated)
    stated.pop(str(grid.baseline), None)  # what is the baseline's own algorithm differs in nothing from it
    try:
        claims = merged_claims(grid.claims, runs_as)
    except UserError as error:
        raise error.with_location(file=grid.file) from None
    return replace(grid, cells=cells, equalities=tuple(equalities), stated=tuple(stated), claims=claims)


def _measure(unknown: Mapping[tuple[str, bool], Objective], cache: Path, progress: Progress | None) -> None:
    """Run `python -m klab.harness.exact.measure` on these objectives."""
    wanted = [json.dumps([objective.settings(), on_policy]) for (_, on_policy), objective in unknown.items()]
    command = python_command("-m", "klab.harness.exact.measure", str(cache))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"[{','.join(wanted)}]")
        child.stdin.close()
        for line in child.stdout:
            done, _, total = line.partition("/")
            if progress is not None and done.strip().isdigit() and total.strip().isdigit():
                progress(int(done), int(total))
    if child.returncode:
        raise RuntimeError(f"measuring the objectives failed with exit code {child.returncode}")


def _writable(folder: Path, scratch: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return scratch
