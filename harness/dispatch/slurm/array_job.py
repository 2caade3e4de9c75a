"""One job array: the script that Slurm gets, and handing it over through submitit."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.grid import UserError
from klab.grid.schema.sections import Resources
from klab.harness.dispatch.slurm import client as scheduler
from klab.harness.dispatch.slurm.submission import folder, job_name
from klab.harness.dispatch.slurm.task import ROUNDS, Task
from klab.harness.store import Run

if TYPE_CHECKING:
    from submitit import SlurmExecutor

OURS = (
    *("array", "job-name", "output", "error", "open-mode", "signal", "chdir", "dependency", "requeue", "no-requeue"),
    *("nodes", "ntasks", "ntasks-per-node"),
)
"""Options of sbatch that klab sets itself."""

_SHIELD = 'trap "" USR2 TERM; exec "$@"'
"""A signal that arrives while Python is starting must not end the job."""

_FULL = ("submit limit", "MaxSubmit", "temporarily unable to accept job")


class Refused(RuntimeError):
    """Slurm does not take the job. `full`: it would take a smaller one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.full = any(word in text for word in _FULL)


@dataclass(frozen=True, slots=True)
class Order:
    """One array: submission `number` of a run, whose task i trains `cells[i]`, `parallel` of them at a time.

    `after` is the job that has to end first.
    """

    run: Run
    number: int
    cells: tuple[tuple[str, ...], ...]
    resources: Resources
    parallel: int
    after: str | None = None
    name: str = ""

    @property
    def folder(self) -> Path:
        return folder(self.run.jobs, self.number)


def script(order: Order) -> str:
    """The text for sbatch."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{_python()} -u -m submitit.core._submit {shlex.quote(str(order.folder))}"
    elements = len(order.cells) if len(order.cells) > 1 else None
    text: str = _make_sbatch_string(command, order.folder, map_count=elements, **parameters(order))
    return text


def submit(order: Order) -> str:
    """Hand the array to Slurm and return its job id.

    Raises:
        Refused: when Slurm does not take it; nothing is in its queue then.
        NoAnswer: when it is not known whether Slurm took it.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = _executor(order)
    grace = signal_delay(order.resources.minutes) / 2
    wanted = order.resources
    jobs_tasks = [Task(str(order.run.path), cells, wanted.cpus, grace, tasks(wanted)) for cells in order.cells]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats sbatch's words there
            jobs = executor.submit_array(jobs_tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        job = scheduler.find([order.name]).get(order.name)  # a lost answer is not a refusal
        if job is None:
            raise Refused(_words(str(error))) from error
        return job
    return str(jobs[0].job_id).split("_")[0]


def parameters(order: Order) -> dict[str, Any]:
    """submitit's parameters for an order."""
    wanted = order.resources
    extra = {name.lstrip("-").replace("_", "-"): value for name, value in wanted.sbatch.items() if value is not False}
    given: dict[str, Any] = {
        "job_name": order.name or job_name(order.run.name, order.number),
        "time": wanted.minutes,
        "nodes": wanted.nodes,
        "cpus_per_task": wanted.cpus,
        "gpus_per_node": wanted.gpus or None,
        "mem": _memory(wanted.memory_gb),
        "partition": wanted.partition,
        "account": wanted.account,
        "qos": wanted.qos,
        "constraint": wanted.constraint,
        "exclude": wanted.exclude,
        "dependency": f"afterany:{order.after}" if order.after else None,
        "signal_delay_s": signal_delay(wanted.minutes),
        "array_parallelism": order.parallel,
        "setup": [*wanted.setup, *_repair(order)],
        "additional_parameters": {"requeue": True, **extra},
        "wckey": None,
    }
    if tasks(wanted) > 1:  # one that dies takes the others with it
        given |= {"ntasks_per_node": wanted.processes_per_node, "srun_args": ["--kill-on-bad-exit=1"]}
    return given


def tasks(resources: Resources) -> int:
    """The processes of a job, over all of its nodes, which train together."""
    return resources.nodes * resources.processes_per_node


def signal_delay(minutes: int) -> int:
    """Seconds before the time limit at which a job saves and requeues itself: a quarter of it, at most 120."""
    return max(10, min(120, minutes * 15))


def _executor(order: Order) -> SlurmExecutor:
    from submitit import SlurmExecutor

    try:
        executor = SlurmExecutor(order.folder, max_num_timeout=ROUNDS, python=_python())
    except RuntimeError as error:
        raise UserError("there is no srun here", hint="Launch on a login node, or choose --on local.") from error
    executor.update_parameters(**parameters(order))
    return executor


def _python() -> str:
    return shlex.join(["sh", "-c", _SHIELD, "klab", sys.executable])


def _repair(order: Order) -> list[str]:
    """Lines that make the job's pickle where its launcher died before it was in place."""
    pickle = f"{shlex.quote(str(order.folder))}/$job'_submitted.pkl'"
    python, run = shlex.quote(sys.executable), shlex.quote(str(order.run.path))
    return [
        "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        f"rm -f {pickle}.save_tmp",
        f"test -e {pickle} || {python} -m klab.harness.dispatch.slurm.task {run} {order.number}",
    ]


def _memory(gigabytes: float) -> str:
    return f"{int(gigabytes)}G" if gigabytes == int(gigabytes) else f"{round(gigabytes * 1024)}M"


def _words(text: str) -> str:
    """sbatch's own complaint out of submitit's message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in lines if line.startswith("sbatch:")]
    return "; ".join(said) or (lines[-1] if lines else "sbatch failed without a word")
