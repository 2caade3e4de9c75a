"""`klab extend`: more seeds for a run, or for those of its comparisons that are open."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from klab.grid import Grid, UserError
from klab.harness.cli.arguments import (
    RUNS,
    CellsPerJobOption,
    DetachOption,
    DeviceOption,
    JsonOption,
    MaxParallelOption,
    ProfileOption,
    RunArgument,
    RunsOption,
    run_of,
)
from klab.harness.cli.execution import Where, WhereOption, Work, backend, carry_out
from klab.harness.cli.progress import Board
from klab.harness.cli.text import say, show_json
from klab.harness.dispatch.tuning import pending
from klab.harness.store import Run
from klab.harness.store.looks import extended


def extend(
    run: RunArgument,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds to add to each cell.")],
    undecided: Annotated[
        bool, typer.Option("--undecided", help="Only to cells whose comparison or claim is open, and to the baseline.")
    ] = False,
    most: Annotated[
        int | None,
        typer.Option("--most", min=1, help="Seeds per cell that there will ever be; default: as stated, or no more."),
    ] = None,
    on: WhereOption = Where.local,
    detach: DetachOption = False,
    max_parallel: MaxParallelOption = None,
    cells_per_job: CellsPerJobOption = None,
    device: DeviceOption = None,
    profile: ProfileOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be added; write nothing.")] = False,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Add seeds to a run and run them. All looks at it together keep the error rate of 0.05: each has its share.

    After an interruption, launching the grid file again goes on with the added cells.
    """
    opened = run_of(run, runs)
    if pending(opened):
        raise UserError("has not chosen its tuned settings yet", file=opened.path, hint="Launch it again first.")
    from klab.reports.extension import extension
    from klab.reports.study import load_runs

    study = load_runs([opened.path])
    found = extension(study, seeds, most, undecided)
    if as_json and (dry_run or not found.cells):
        show_json({"run": str(opened.path), "cells": [cell.id for cell in found.cells], "level": found.level})
        return
    if not found.cells:
        say("no comparison is open, and no claim: nothing to add")
        return
    if not as_json:
        claims = f", {found.claims} undecided claim{'s' * (found.claims > 1)}" if found.claims else ""
        many = "" if found.open is None else f" ({found.open} open comparisons{claims}, and the baseline)"
        say(f"{len(found.groups)} configurations{many} get {len(found.seeds)} seeds each: {len(found.cells)} cells")
        say(
            f"the next look is at {len(opened.manifest['seeds']) + seeds} of at most {found.most} seeds and may err "
            f"with {found.level:.2g} of 0.05; earlier looks have the rest"
        )
    if dry_run:
        return
    work, track = prepared(opened, [*found.cells], on, max_parallel, cells_per_job, device, profile)
    with opened.lock("adding seeds"):
        opened = Run.open(opened.path)
        if set(opened.manifest["seeds"]) & set(found.seeds):
            raise UserError("was extended by somebody else in the meantime", file=opened.path)
        opened.refuse_changed_inputs()
        changes = extended(opened.manifest, found.seeds, found.most, len(found.cells), undecided)
        opened.grow(found.cells, **changes)
    carry_out(opened, [cell.id for cell in found.cells], work, on, track, detach=detach, as_json=as_json)


def prepared(
    run: Run,
    cells: list[Any],
    on: Where,
    max_parallel: int | None,
    cells_per_job: int | None,
    device: Any,
    profile: str | None,
) -> tuple[Work, tuple[str, ...]]:
    """How to carry out cells that a run gets, with the resources of the run, and who follows its curves."""
    track = tuple(str(name) for name in run.manifest.get("track", ()))
    study = Grid(
        name=run.name,
        description="",
        cells=tuple(cells),
        axes={},
        design="list",
        seeds=tuple(dict.fromkeys(cell.seed for cell in cells)),
        baseline=run.baseline,
        resources=run.resources,
        track=track,
        file=str(run.path / "grid.yaml"),
        text=run.grid_text,
    )
    flags = {"max_parallel": max_parallel, "cells_per_job": cells_per_job}
    board = Board() if on is Where.here else None
    given = {name: value for name, value in flags.items() if value is not None}
    executor, workers, resources = backend(on, study, given, device, profile, board)
    size = cells_per_job or resources.cells_per_job or (1 if on is Where.slurm else None)
    return Work(executor, workers, resources, size, False, board), track
