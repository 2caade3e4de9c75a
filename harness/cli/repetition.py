"""Training one cell of a run again, in a run folder of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from klab.grid import Cell, Grid
from klab.grid.yaml_document import dump_yaml
from klab.harness.cli.arguments import Device
from klab.harness.cli.table import console
from klab.harness.store import CellFolder, Run, machine

if TYPE_CHECKING:
    from klab.harness.training.runner import Progress as Told


def repeat(
    origin: Run, cell: Cell, place: Path, device: Device | None, hardware: Mapping[str, Any], quiet: bool
) -> CellFolder:
    """Train the cell in a run folder of its own, with the original's starting policies where it has them.

    Args:
        hardware: of the original's result; as many processes and threads give the same bits.
    """
    from klab.harness.dispatch import gpus
    from klab.harness.dispatch.job import run_job
    from klab.harness.dispatch.local.backend import LocalExecutor
    from klab.harness.dispatch.threads import limit_threads

    if device is Device.cuda:
        gpus.require_gpu("--device", device.value)
    choice = device.value if device else gpus.default_device([cell.policy.name], origin.resources.gpus)
    if choice == "cpu":
        gpus.hide_gpus()
    place.mkdir(parents=True, exist_ok=True)
    policies = place / "policies"
    if origin.policies.is_dir() and not policies.exists():
        policies.symlink_to(origin.policies)
    scratch = Run.create(place, _alone(origin, cell), origin.created)
    processes, threads = _count(hardware, "processes"), min(_count(hardware, "threads"), machine.cores())
    limit_threads(threads)
    with _bar(cell, quiet) as tell:
        devices = LocalExecutor(device=choice).gpus()[:processes]
        run_job(
            scratch.path,
            (cell.id,),
            executor="here",
            threads=threads,
            progress=tell,
            processes=processes,
            devices=devices,
        )
    return scratch.cell(cell.id)


def _count(hardware: Mapping[str, Any], what: str) -> int:
    found = hardware.get(what)
    return found if isinstance(found, int) and found > 0 else 1


def _alone(origin: Run, cell: Cell) -> Grid:
    return Grid(
        name=f"{origin.name}-rerun",
        description=f"one cell of {origin.name}, repeated",
        cells=(cell,),
        axes={},
        design="list",
        seeds=(cell.seed,),
        baseline=None,
        resources=origin.resources,
        track=(),
        file="rerun.yaml",  # a file of user code given with --set is relative to the working folder
        text=dump_yaml(cell.resolved()),
    )


@contextmanager
def _bar(cell: Cell, quiet: bool) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), disable=quiet) as bar:
        task = bar.add_task("starting", total=cell.training.updates)

        def tell(told: Told) -> None:
            reward = "" if told.reward is None else f"reward {told.reward:.3f}"
            bar.update(task, completed=told.update, description=reward or "starting")

        yield tell
