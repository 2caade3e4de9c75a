"""What a backend (local pool, Slurm, this process) offers to `launch`, `status` and `cancel`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from klab.grid.schema.sections import Resources

if TYPE_CHECKING:
    from klab.harness.store import Run

JobState = Literal[
    "queued",  # accepted, not started
    "running",
    "preempted",  # interrupted by the scheduler and requeued by it
    "ended",  # the scheduler says the job is over without an error; the cell's own folder says how it went
    "failed",  # over with an error: exit code, signal, out of memory, time limit, node failure
    "cancelled",
    "unknown",  # the scheduler was asked and gave no answer: never to be read as failed
]


@dataclass(frozen=True, slots=True)
class Pack:
    """Cells that one job trains together, in order."""

    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What a scheduler says of the job that holds a cell.

    `reason` is the scheduler's own word ("Resources", "OUT_OF_MEMORY", "TIMEOUT", "NODE_FAIL"), `seconds_left` what
    remains of the time limit. A cell of which the scheduler knows nothing has no `JobStatus` at all.
    """

    state: JobState
    job: str = ""
    reason: str = ""
    exit_code: int | None = None
    signal: int | None = None
    seconds_left: float | None = None


class Executor(Protocol):
    """One backend. All of a run's cells are asked about at once; nothing here waits for training."""

    @property
    def name(self) -> str: ...

    def submit(self, run: Run, packs: Sequence[Pack], resources: Resources) -> None:
        """Hand the packs over and return. Called under the run's lock; safe to repeat after a crash at any point."""
        ...

    def states(self, run: Run) -> dict[str, JobStatus]:
        """Cell id -> scheduler's word, for the cells it knows something about; one query for all."""
        ...

    def cancel(self, run: Run, cell_ids: Iterable[str]) -> None:
        """Stop the cells' jobs, or take them out of the queue; pack mates that are not named go on."""
        ...
