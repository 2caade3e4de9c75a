"""The interface of an executor (local pool, Slurm, this process): what `launch`, `status` and `cancel` need of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from klab.grid.schema.sections import Resources

if TYPE_CHECKING:
    from klab.harness.store import Run

JobState = Literal[
    "queued",  # accepted, not started
    "held",  # accepted, but will not start before a user or an administrator releases it
    "running",
    "preempted",  # interrupted by the scheduler and requeued by it
    "ended",  # over without an error; how training went is in the cell's own folder
    "failed",  # over with an error: exit code, signal, out of memory, time limit, node failure
    "cancelled",
    "unknown",  # the scheduler was asked and did not answer: never evidence of a failure
]


@dataclass(frozen=True, slots=True)
class Pack:
    """The cells that one job trains together, in order."""

    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What a scheduler says of the job that holds a cell. A cell that the scheduler does not know has no `JobStatus`.

    Attributes:
        job: the scheduler's id of the job or array task.
        reason: the scheduler's own word ("Resources", "OUT_OF_MEMORY", "TIMEOUT", "NODE_FAIL").
        seconds_left: until the time limit.
    """

    state: JobState
    job: str = ""
    reason: str = ""
    exit_code: int | None = None
    signal: int | None = None
    seconds_left: float | None = None


class JobSource(Protocol):
    """Who knows of jobs. A query is about all of a run's cells at once."""

    @property
    def name(self) -> str: ...

    def states(self, run: Run) -> dict[str, JobStatus]:
        """Cell id -> status of its job, for the cells that it knows; one query for all."""
        ...


class Executor(JobSource, Protocol):
    """Where jobs run."""

    def submit(self, run: Run, packs: Sequence[Pack], resources: Resources) -> None:
        """Submit one job per pack. Called under the run's lock; safe to repeat after a crash at any point."""
        ...

    def cancel(self, run: Run, cell_ids: Iterable[str]) -> None:
        """Stop the cells' jobs, or take them out of the queue; other cells of the same jobs go on."""
        ...

    def hold(self, run: Run, cell_ids: Iterable[str]) -> None:
        """Keep these cells, which their folders say are held, from starting; other cells of the same jobs go on."""
        ...

    def release(self, run: Run, cell_ids: Iterable[str]) -> set[str]:
        """Let cells that were held start again; those that will by themselves. Called under the run's lock."""
        ...
