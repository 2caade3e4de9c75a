"""Checks of a grid for `klab plan` and `klab launch`: all mistakes at once, a line each, and exit code 2."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from klab.grid import Grid, UserError
from klab.grid.engines import rows_per_pass
from klab.grid.schema.sampler import check_processes
from klab.grid.tuning import launched
from klab.grid.user_code import is_installed
from klab.harness.cli.memory import JobMemory, MemoryNeed, memory_needs, refuse_lone_shares
from klab.harness.cli.text import say
from klab.harness.cli.tracking import require_trackers
from klab.harness.dispatch.launch import refuse_changed_inputs
from klab.harness.preflight import Preflight, Results
from klab.harness.store import Run
from klab.harness.training.data.notes import precision_notes

CheckOption = Annotated[
    bool,
    typer.Option(
        "--check/--no-check", help="Load your code, the data, tokenizers and models' settings once, and try them."
    ),
]


@dataclass(frozen=True, slots=True)
class Found:
    """What the checks of a grid without mistakes found."""

    notes: list[str]
    memory: list[MemoryNeed]


class Checks:
    """The checks of a grid, begun at once; `finish` waits for them.

    Args:
        folder: the run folder that a launch would use.
        accept_changes: whether cells may be added or continued under changed code, data or models.
        executor, retry_failed: of the launch.
        look_inside: load code, data and models, in a process of its own; otherwise only what a launch refuses anyway.
        starts_here: whether cells are about to train on this machine, so that what they need must be here.
    """

    def __init__(
        self,
        study: Grid,
        folder: Path,
        look_inside: bool,
        accept_changes: bool = False,
        executor: str = "local",
        retry_failed: bool = False,
        starts_here: bool = False,
    ) -> None:
        self._starts_here = starts_here
        self._executor, self._retry_failed = executor, retry_failed
        self._study, self._folder, self._accept_changes = launched(study), folder, accept_changes
        self._preflight = Preflight(self._study) if look_inside else None

    def finish(self, study: Grid, job: JobMemory) -> Found:
        """What may surprise, and what memory is needed.

        Args:
            study: what is launched: the grid, in which equal algorithms may have been merged.
            job: what each job gets.

        Raises:
            typer.Exit: with exit code 2, after all mistakes were printed to standard error.
        """
        refusals: list[Callable[[], None]] = [
            self._refuse_run,
            lambda: require_trackers(self._study.track),
            lambda: require_samplers(self._study, self._starts_here),
            lambda: refuse_unequal_shares(self._study),
            lambda: refuse_lone_shares(study, job),
        ]
        mistakes = []
        for refuse in refusals:
            try:
                refuse()
            except UserError as error:
                mistakes.append(str(error))
        results = self._preflight.results() if self._preflight is not None else Results(())
        mistakes += [finding.text for finding in results.findings if finding.is_mistake]
        needs = list(memory_needs(study, results.memory, self._study, job))
        mistakes += dict.fromkeys(str(refusal) for need in needs if (refusal := need.refusal(study.file)))
        if mistakes:
            for line in mistakes:
                say(f"klab: {line}", error=True)
            raise typer.Exit(2)
        policies = {id(cell.policy): cell.policy for cell in study.cells}.values()
        precision = dict.fromkeys(note for policy in policies for note in precision_notes(policy, job.on_gpu))
        notes = [finding.text for finding in results.findings]
        notes += absent_samplers(self._study)
        notes += unreachable(self._study)
        return Found([*notes, *(f"{study.file}: {note}" for note in precision)], needs)

    def _refuse_run(self) -> None:
        """Raises UserError where the run folder is another grid's, or was made with other code, data or models."""
        Run.check_grid(self._folder, self._study, self._accept_changes)
        if (self._folder / "manifest.json").exists() and not self._accept_changes:
            cells = {cell.id for cell in self._study.cells}
            refuse_changed_inputs(Run.open(self._folder), self._executor, self._retry_failed, cells)


def require_samplers(study: Grid, starts_here: bool = True) -> None:
    """Raises UserError where the sampler of a cell is not installed, or is a server for several processes.

    Cells of TRL may be planned without vllm, and TRL sends the weights of all its processes to one server.
    """
    sampled = [cell.training for cell in study.cells if cell.training.sampler is not None]
    asked = any(
        training.sampler.engine == "vllm" and (starts_here or training.engine != "trl")
        for training in sampled
        if training.sampler is not None
    )
    processes = study.resources.processes_per_node * study.resources.nodes
    for training in sampled:
        if training.sampler is not None and training.engine != "trl":
            check_processes(training.sampler, processes)
    if asked and not is_installed("vllm"):  # the module that says so imports torch
        from klab.harness.policy.sampling.vllm import require_vllm

        require_vllm()


def absent_samplers(study: Grid) -> Iterator[str]:
    """A line where cells of TRL need vllm and it is not installed here: they may train elsewhere."""
    samplers = (cell.training.sampler for cell in study.cells if cell.training.engine == "trl")
    if any(sampler is not None for sampler in samplers) and not is_installed("vllm"):
        yield f"{study.file}: training.sampler: vllm is not installed here; it has to be where the cells train"


def unreachable(study: Grid) -> Iterator[str]:
    """A line for everybody whom the study is to tell of its events, and could not tell from here."""
    wanted = study.notify
    if wanted is None:
        return
    if wanted.command and shutil.which(wanted.command[0]) is None:
        yield f"{study.file}: notify.command: there is no program {wanted.command[0]!r} here"
    if wanted.variable is not None and not os.environ.get(wanted.variable):
        yield f"{study.file}: notify.webhook: the environment variable {wanted.variable} is not set here"


def refuse_unequal_shares(study: Grid) -> None:
    """Raises UserError where the processes of a job cannot share the trajectories of an update as TRL needs it."""
    wanted = study.resources
    for training in dict.fromkeys(cell.training for cell in study.cells if cell.training.engine == "trl"):
        rows_per_pass(training, wanted.nodes * wanted.processes_per_node)


def show_notes(notes: Sequence[str], quiet: bool) -> None:
    """Print notes for people; programs get them as JSON, or not at all."""
    for note in () if quiet else notes:
        say(f"note: {note}")
