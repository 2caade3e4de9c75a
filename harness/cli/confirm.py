"""`klab confirm`: a run's best cells, or those of its claims, on fresh seeds, as a run of its own."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

from klab.grid import UserError, user_code
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
from klab.harness.cli.execution import Where, WhereOption, carry_out
from klab.harness.cli.extend import prepared
from klab.harness.cli.text import say, show_json
from klab.harness.dispatch.tuning import pending
from klab.harness.store import Run
from klab.harness.store.confirmation import confirms, default_name


def confirm(
    run: RunArgument,
    top: Annotated[int, typer.Option("--top", min=1, help="How many of the best cells, beside the baseline.")] = 3,
    claims: Annotated[
        bool, typer.Option("--claims", help="Instead, both sides of every claim that is decided.")
    ] = False,
    undecided: Annotated[bool, typer.Option("--undecided", help="With --claims: of undecided claims, too.")] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=2, help="Fresh seeds for each of them.")] = 10,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the new run; default: RUN-confirm, RUN-confirm-claims.")
    ] = None,
    on: WhereOption = Where.local,
    detach: DetachOption = False,
    max_parallel: MaxParallelOption = None,
    cells_per_job: CellsPerJobOption = None,
    device: DeviceOption = None,
    profile: ProfileOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run; write nothing.")] = False,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Run the best cells and the baseline, or the cells of claims, again on fresh seeds; the report of the new run
    judges these alone.

    The same command again goes on with it.
    """
    explored = run_of(run, runs)
    if pending(explored):
        raise UserError("has not chosen its tuned settings yet", file=explored.path, hint="Launch it again first.")
    from klab.reports.comparison import compare_all
    from klab.reports.confirmation import confirmation, same_request
    from klab.reports.confirmed_claims import asked_for, claims_confirmation
    from klab.reports.study import load_runs

    if confirms(explored) is not None:
        raise UserError("is a confirmation itself", file=explored.path, hint="`klab extend` adds seeds to it.")
    if undecided and not claims:
        raise UserError("belongs to --claims", key="--undecided", value=True)
    called = name or default_name(explored, claims)
    folder = explored.path.parent / called
    if (folder / "manifest.json").exists():
        made = Run.open(folder)
        wanted = {"--claims": asked_for(undecided)} if claims else {"--top": top}
        same_request(made, {**wanted, "--seeds": seeds}, folder)
        cells = [made.cell(identity).cell() for identity in made.cells]
        if dry_run:
            say(f"{made.name} exists: {len(cells)} cells")
            return
    else:
        study = load_runs([explored.path])
        if claims:
            grid, record = claims_confirmation(study, undecided, seeds, called)
        else:
            grid, record = confirmation(study, compare_all(study), top, seeds, called)
        cells = list(grid.cells)
        if not as_json:
            chosen = [study.labels[group] for group in grid.groups]
            say(f"{called}: {', '.join(chosen)}, {seeds} fresh seeds each: {len(cells)} cells")
        if dry_run:
            if as_json:
                show_json({"run": str(folder), "cells": [cell.id for cell in cells]})
            return
        explored.refuse_changed_inputs()
        with user_code.searching(known=explored.user_code()):
            made = Run.create(folder, grid, explored.created)
        with made.lock("recording what is confirmed"):
            made.grow((), **record)
        _copy_policies(explored, made)
    work, track = prepared(made, cells, on, max_parallel, cells_per_job, device, profile)
    carry_out(made, [cell.id for cell in cells], work, on, track, detach=detach, as_json=as_json)


def _copy_policies(origin: Run, run: Run) -> None:
    """Start from the exploration's own starting policies."""
    if not origin.policies.is_dir():
        return
    for folder in origin.policies.iterdir():
        target = run.policies / folder.name
        if folder.is_dir() and not folder.is_symlink() and not target.exists():
            run.policies.mkdir(exist_ok=True)
            temporary = target.with_name(f".{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(folder, temporary)
            temporary.rename(target)
