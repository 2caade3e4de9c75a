"""Carrying cells out: where they run, what each job gets, and what is said while they do and at the end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from klab.grid import Grid, UserError
from klab.grid.schema.sections import Resources
from klab.harness.cli.arguments import Device
from klab.harness.cli.progress import Board, follow, report_problem
from klab.harness.cli.table import console
from klab.harness.cli.text import show_json
from klab.harness.cli.tracking import Tracking
from klab.harness.dispatch.backends import Executor
from klab.harness.dispatch.gpus import default_device, require_gpu
from klab.harness.dispatch.launch import LaunchResult
from klab.harness.dispatch.launch import launch as submit
from klab.harness.dispatch.local.backend import LocalExecutor
from klab.harness.dispatch.local.queue_files import controller_is_alive
from klab.harness.dispatch.local.ready import ReadyController
from klab.harness.dispatch.status import count, statuses
from klab.harness.dispatch.tuning import pending
from klab.harness.store import Run, machine


class Where(StrEnum):
    local = "local"
    here = "here"
    slurm = "slurm"


WhereOption = Annotated[
    Where, typer.Option("--on", help="Where: this machine's cores or GPUs, this process, or Slurm.")
]


@dataclass(frozen=True)
class Work:
    """How cells are carried out.

    Attributes:
        workers: jobs at a time.
        resources: what each job gets.
        size: cells per job at most; None chooses.
        board: the progress of cells that train in this very process.
    """

    executor: Executor
    workers: int
    resources: Resources
    size: int | None
    retry_failed: bool
    board: Board | None


def carry_out(
    run: Run, cells: Collection[str], work: Work, on: Where, track: Sequence[str], *, detach: bool, as_json: bool
) -> None:
    """Run these cells, and say how they get on; returns when they have ended, or at once where that was asked for."""
    tracking = Tracking(run, track)
    given: dict[str, Any] = {"workers": work.workers, "retry_failed": work.retry_failed, "cells_per_job": work.size}
    given |= {"resources": work.resources, "only": cells}
    if work.board is not None:
        with work.board.live(run, work.retry_failed):
            done = submit(run, work.executor, **given)
        for line in done.verdict.lines() if done.verdict is not None and not as_json else ():
            console().print(line, markup=False, soft_wrap=True)
        tracking.finish()
        _end(run, as_json)
        return
    done = submit(run, work.executor, **given)
    if isinstance(work.executor, LocalExecutor):
        work.executor.end_ready()
    if not as_json:
        _announce(run, done, on, work.workers)
    if not detach and on is Where.local and not follow(run, quiet=as_json, each=tracking.tick):
        return
    if detach or on is Where.slurm:
        if as_json:
            show_json({"run": str(run.path), "jobs": [list(pack.cells) for pack in done.packs]})
        elif tracking.names:
            console().print(
                f"curves go to {' and '.join(tracking.names)} while somebody watches: klab watch {run.path} "
                + " ".join(f"--track {name}" for name in tracking.names)
            )
        return
    tracking.finish()
    _end(run, as_json)


def ready_controller(study: Grid, folder: Path, cpus: int | None) -> ReadyController | None:
    """A process that imports what the study's jobs need while the study is checked; None where a controller works on
    the run already.

    Args:
        cpus: asked for on the command line.
    """
    if controller_is_alive(Run(folder.resolve(), {})):
        return None
    different = {(id(cell.task), id(cell.policy), cell.training.engine): cell for cell in study.cells}
    threads = min(cpus or study.resources.cpus, machine.cores())
    return ReadyController((cell.resolved() for cell in different.values()), threads)


def backend(
    on: Where,
    study: Grid,
    flags: dict[str, Any],
    device: Device | None,
    profile: str | None,
    board: Board | None,
    ready: ReadyController | None = None,
) -> tuple[Executor, int, Any]:
    """The backend, how many jobs it runs at a time, and what each gets.

    Args:
        ready: a process that becomes the local pool's controller.
    """
    choice = device.value if device else None
    if on is Where.slurm:
        if choice is not None:
            raise UserError("is for this machine", key="--device", value=choice, hint="On Slurm, --gpus asks for GPUs.")
        from klab.harness.dispatch.slurm.backend import SlurmExecutor

        slurm = SlurmExecutor(flags, profile)
        resources = slurm.resources(study.resources)
        return slurm, resources.max_parallel or len(study.cells), study.resources  # it adds profile and flags itself
    for option in ("partition", "account", "qos", "constraint", "exclude", "nodes", "setup", "sbatch"):
        if option in flags:
            raise UserError("is for Slurm", key=f"--{option}", value=flags[option], hint="Add --on slurm.")
    resources = study.resources.model_copy(update=flags)
    if choice == "cuda":
        require_gpu("--device", choice)
    elif choice is None and resources.gpus:
        require_gpu("resources.gpus", resources.gpus)
    choice = choice or default_device((cell.policy.name for cell in study.cells), resources.gpus)
    if on is Where.here:
        from klab.harness.dispatch.local.inline import InlineExecutor

        return InlineExecutor(progress=board.tell if board else None, device=choice), 1, resources
    local = LocalExecutor(max_parallel=resources.max_parallel, device=choice, ready=ready)
    return local, local.slots(resources.cpus, local.processes(resources)), resources


def _announce(run: Run, done: LaunchResult, on: Where, workers: int) -> None:
    submitted = sum(len(pack.cells) for pack in done.packs)
    later = len(pending(run))
    left = {
        state: number
        for state, number in count(done.before).items()
        if state in ("finished", "diverged", "stopped", "failed")
    }
    known = "".join(f"; {number} {state} before" for state, number in left.items())
    screen = console()
    screen.print(f"{submitted} cells in {len(done.packs)} jobs on {on.value}, {workers} at a time{known}")
    if later:
        screen.print(f"{later} cells have to wait for the runs that choose their settings, and follow by themselves")
    screen.print(f"run folder: {run.path}", markup=False, soft_wrap=True)
    for line in done.verdict.lines() if done.verdict is not None else ():
        screen.print(line, markup=False, soft_wrap=True)
    if not done.packs and left.get("failed"):
        screen.print(f"nothing to do: {left['failed']} failed before; --retry-failed runs them again")


def _end(run: Run, as_json: bool) -> None:
    rows = statuses(run)
    states = count(rows)
    if as_json:
        show_json({"run": str(run.path), "states": states})
    else:
        screen = console()
        screen.print(", ".join(f"{number} {state}" for state, number in states.items()))
        if states.get("failed"):
            screen.print("why cells failed: klab logs RUN CELL; run them again: klab launch … --retry-failed")
        screen.print(f"next: klab report {run.path}", markup=False, soft_wrap=True)
    if report_problem(run, rows) or states.get("failed"):
        raise typer.Exit(1)
