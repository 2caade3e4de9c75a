"""`klab launch`: run a grid file's cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from klab.grid import Grid, UserError
from klab.grid.schema.sections import Resources, parse_gpus
from klab.grid.tuning import launched
from klab.harness.cli.arguments import (
    RUNS,
    CellsPerJobOption,
    DetachOption,
    DeviceOption,
    GridArgument,
    JsonOption,
    MaxParallelOption,
    ProfileOption,
    RunsOption,
    grid_of,
    run_of,
)
from klab.harness.cli.checked import CheckOption, Checks, show_notes
from klab.harness.cli.execution import Where, WhereOption, Work, backend, carry_out, ready_controller
from klab.harness.cli.memory import JobMemory
from klab.harness.cli.merged import MergeOption, merged_grid
from klab.harness.cli.progress import Board
from klab.harness.cli.table import console
from klab.harness.cli.text import say, show_json
from klab.harness.dispatch.backends import Executor, Pack
from klab.harness.dispatch.launch import should_submit
from klab.harness.dispatch.packing.packs import make_packs
from klab.harness.dispatch.packing.step_times import HardwareKey, read_step_times
from klab.harness.dispatch.status import statuses
from klab.harness.dispatch.tuning import pending
from klab.harness.store import Run, adoption
from klab.harness.store.manifest import cells_of
from klab.harness.store.tuning import record_of


def launch(
    grid: GridArgument,
    on: WhereOption = Where.local,
    detach: DetachOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be submitted; write nothing.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Also run failed cells again.")] = False,
    max_parallel: MaxParallelOption = None,
    cells_per_job: CellsPerJobOption = None,
    device: DeviceOption = None,
    partition: Annotated[str | None, typer.Option(help="Slurm: partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm: account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm: quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Slurm: node features.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Slurm: nodes not to use.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Slurm: nodes per job.")] = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="[TYPE:]N", help="GPUs per node of a job; on Slurm also their type: a100:4.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Cores, hence threads, per process.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that train a cell together; default: one per GPU, or one.")
    ] = None,
    memory_gb: Annotated[float | None, typer.Option(help="Slurm: memory per job.")] = None,
    minutes: Annotated[int | None, typer.Option(min=1, help="Slurm: time limit of a job.")] = None,
    setup: Annotated[list[str] | None, typer.Option(help="Slurm: shell line before the job; may be repeated.")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Slurm: further option as name=value; may be repeated.")
    ] = None,
    profile: ProfileOption = None,
    merge: MergeOption = True,
    check: CheckOption = True,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Train cells although code, data or models changed since the launch."),
    ] = False,
    adopt: Annotated[
        str | None, typer.Option("--adopt", metavar="RUN", help="First take over the finished cells that RUN has, too.")
    ] = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Run a grid file's cells. Launching again continues: results stay, running cells go on, the rest is run."""
    study = grid_of(grid)
    folder = runs / study.name
    starts_here = on is not Where.slurm and not dry_run
    ready = ready_controller(study, folder, cpus) if starts_here and on is Where.local else None
    checks = Checks(study, folder, check, accept_changes, on.value, retry_failed, starts_here)
    if merge:
        study = merged_grid(study, folder, quiet=as_json).grid
    study = launched(study)
    flags = {
        "partition": partition,
        "account": account,
        "qos": qos,
        "constraint": constraint,
        "exclude": exclude,
        "nodes": nodes,
        **(parse_gpus(gpus, "--gpus") if gpus is not None else {}),
        "cpus": cpus,
        "processes": processes,
        "memory_gb": memory_gb,
        "minutes": minutes,
        "max_parallel": max_parallel,
        "cells_per_job": cells_per_job,
        "setup": setup or None,
        "sbatch": _pairs(sbatch or []) or None,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    board = Board() if on is Where.here else None
    executor, workers, resources = backend(on, study, given, device, profile, board, ready)
    size = cells_per_job or resources.cells_per_job or (1 if on is Where.slurm else None)
    show_notes(checks.finish(study, _memory(executor, resources, size)).notes, as_json)
    if dry_run:
        _rehearse(study, folder, executor, workers, size, resources, retry_failed, as_json)
        return
    adopted_from = run_of(adopt, runs) if adopt is not None else None
    run = Run.create(folder, study, accept_changes=accept_changes)
    if adopted_from is not None:
        _adopt(run, adopted_from, as_json)
    work = Work(executor, workers, resources, size, retry_failed, board)
    carry_out(run, {cell.id for cell in study.cells}, work, on, study.track, detach=detach, as_json=as_json)


def _memory(executor: Executor, resources: Resources, cells_per_job: int | None) -> JobMemory:
    """What memory each job gets."""
    if executor.name == "slurm":
        from klab.harness.dispatch.slurm.backend import SlurmExecutor

        assert isinstance(executor, SlurmExecutor)
        return JobMemory.on_slurm(executor.resources(resources), cells_per_job)
    return JobMemory.here(resources, cells_per_job, getattr(executor, "device", None))


def _rehearse(
    study: Grid,
    folder: Path,
    executor: Executor,
    workers: int,
    size: int | None,
    resources: Resources,
    retry_failed: bool,
    as_json: bool,
) -> None:
    """What a launch would do now, without writing anything: the packs, and Slurm's very scripts."""
    cells: dict[str, Any] = cells_of(study)
    manifest = {"name": study.name, "cells": cells, "seeds": list(study.seeds), "tuning": record_of(study)}
    run = Run(folder.resolve(), manifest)
    later = dict(pending(run))
    if (folder / "manifest.json").exists():
        known = Run.open(folder)
        taken = {row.id for row in statuses(known) if not should_submit(row, executor.name, retry_failed)}
        run, later = known, dict(pending(known))
        cells = {**cells, **{identity: known.resolved(identity) for identity in known.grown}}
        cells, later = ({name: each[name] for name in each if name not in taken} for each in (cells, later))
    place = HardwareKey.for_launch(executor.name, resources, getattr(executor, "device", None))
    packs = make_packs(cells, size, workers, read_step_times(folder.parent, place)).packs
    if executor.name == "slurm" and later:
        packs = (*packs, *make_packs(later, size, workers).packs)
    text: str | None = None
    if executor.name == "slurm":
        from klab.harness.dispatch.slurm.backend import SlurmExecutor

        assert isinstance(executor, SlurmExecutor)
        text = "\n".join(executor.scripts(run, packs, study.resources))
    if as_json:
        show_json({"packs": [list(pack.cells) for pack in packs], "workers": workers, "script": text})
        return
    if text is not None:
        print(text)
        return
    screen = console()
    screen.print(f"{len(cells)} cells in {len(packs)} jobs, {workers} at a time, on {executor.name}")
    for number, pack in enumerate(packs, 1):
        screen.print(f"  job {number}: {', '.join(_shortened(pack))}")
    if later:
        screen.print(f"then {len(later)} cells, when these have chosen their settings")


def _shortened(pack: Pack, shown: int = 4) -> Sequence[str]:
    more = len(pack.cells) - shown
    return [*pack.cells[:shown], *([f"… {more} more"] if more > 0 else [])]


def _adopt(run: Run, other: Run, quiet: bool) -> None:
    found = adoption.adopt(run, other)
    lines = [f"{len(found.adopted)} cells adopted from {other.path}"]
    if found.different:
        names = dict.fromkeys(name for each in found.different.values() for name in each)
        lines.append(f"{len(found.different)} not adopted: trained with another {', '.join(names)}")
    for line in () if quiet else lines:
        say(line)


def _pairs(words: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UserError("is not name=value", key="--sbatch", value=word)
        pairs[name.lstrip("-")] = value
    return pairs
