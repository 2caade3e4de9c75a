"""One job array: the script that Slurm gets, and handing it over through submitit."""

from __future__ import annotations

import contextlib
import io
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.grid import UserError
from klab.grid.schema.sections import Resources
from klab.grid.user_code import python_command
from klab.harness.dispatch.slurm import client
from klab.harness.dispatch.slurm.submission import folder, job_name
from klab.harness.dispatch.slurm.task import MAX_REQUEUES, ArrayTask
from klab.harness.store import Run

if TYPE_CHECKING:
    from submitit import SlurmExecutor

RESERVED_OPTIONS = (
    *("array", "job-name", "output", "error", "open-mode", "signal", "chdir", "dependency", "requeue", "no-requeue"),
    *("nodes", "ntasks", "ntasks-per-node"),
)
"""Options of sbatch that klab sets itself."""

_SHIELD = 'trap "" USR2 TERM; exec "$@"'
"""A signal that arrives while Python is starting must not end the job."""

_FULL = ("submit limit", "MaxSubmit", "temporarily unable to accept job")


class SubmissionRefused(RuntimeError):
    """Slurm does not take the job. `full`: it would take a smaller one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.full = any(word in text for word in _FULL)


@dataclass(frozen=True, slots=True)
class ArrayJob:
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


def sbatch_script(job: ArrayJob) -> str:
    """The text for sbatch."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{_python()} -u -m submitit.core._submit {shlex.quote(str(job.folder))}"
    elements = len(job.cells) if len(job.cells) > 1 else None
    text: str = _make_sbatch_string(command, job.folder, map_count=elements, **submitit_parameters(job))
    return text


def submit(job: ArrayJob) -> str:
    """Hand the array to Slurm and return its job id.

    Raises:
        Refused: when Slurm does not take it; nothing is in its queue then.
        SlurmUnavailable: when it is not known whether Slurm took it.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = _executor(job)
    grace = signal_delay(job.resources.minutes) / 2
    wanted = job.resources
    array_tasks = [
        ArrayTask(str(job.run.path), cells, wanted.cpus, grace, tasks_per_job(wanted)) for cells in job.cells
    ]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats sbatch's words there
            jobs = executor.submit_array(array_tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        identity = client.find_jobs([job.name]).get(job.name)  # a lost answer is not a refusal
        if identity is None:
            raise SubmissionRefused(_words(str(error))) from error
        return identity
    return str(jobs[0].job_id).split("_")[0]


def submitit_parameters(job: ArrayJob) -> dict[str, Any]:
    """submitit's parameters for a job array."""
    wanted = job.resources
    extra = {name.lstrip("-").replace("_", "-"): value for name, value in wanted.sbatch.items() if value is not False}
    given: dict[str, Any] = {
        "job_name": job.name or job_name(job.run.name, job.number),
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
        "dependency": f"afterany:{job.after}" if job.after else None,
        "signal_delay_s": signal_delay(wanted.minutes),
        "array_parallelism": job.parallel,
        "setup": [*wanted.setup, *_repair(job)],
        "additional_parameters": {"requeue": True, **extra},
        "wckey": None,
    }
    if tasks_per_job(wanted) > 1:  # one that dies takes the others with it
        given |= {"ntasks_per_node": wanted.processes_per_node, "srun_args": ["--kill-on-bad-exit=1"]}
    return given


def tasks_per_job(resources: Resources) -> int:
    """The processes of a job, over all of its nodes, which train together."""
    return resources.nodes * resources.processes_per_node


def signal_delay(minutes: int) -> int:
    """Seconds before the time limit at which a job saves and requeues itself: a quarter of it, at most 120."""
    return max(10, min(120, minutes * 15))


def _executor(job: ArrayJob) -> SlurmExecutor:
    from submitit import SlurmExecutor

    try:
        executor = SlurmExecutor(job.folder, max_num_timeout=MAX_REQUEUES, python=_python())
    except RuntimeError as error:
        raise UserError("there is no srun here", hint="Launch on a login node, or choose --on local.") from error
    executor.update_parameters(**submitit_parameters(job))
    return executor


def _python() -> str:
    return shlex.join(["sh", "-c", _SHIELD, "klab", *python_command()])


def _repair(job: ArrayJob) -> list[str]:
    """Lines that make the job's pickle where its launcher died before it was in place."""
    pickle = f"{shlex.quote(str(job.folder))}/$job'_submitted.pkl'"
    python, run = shlex.join(python_command()), shlex.quote(str(job.run.path))
    return [
        "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        f"rm -f {pickle}.save_tmp",
        f"test -e {pickle} || {python} -m klab.harness.dispatch.slurm.task {run} {job.number}",
    ]


def _memory(gigabytes: float) -> str:
    return f"{int(gigabytes)}G" if gigabytes == int(gigabytes) else f"{round(gigabytes * 1024)}M"


def _words(text: str) -> str:
    """sbatch's own complaint out of submitit's message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in lines if line.startswith("sbatch:")]
    return "; ".join(said) or (lines[-1] if lines else "sbatch failed without a word")
