"""One job array: the script that Slurm gets, and submitting it through submitit.

submitit has no public function for the text of a script that is not submitted, which `launch --dry-run` shows; its
`_make_sbatch_string` is called for it, and a test compares the text shown with the one that sbatch gets.
"""

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
from klab.harness.dispatch.slurm.options import sbatch_options, with_user_options
from klab.harness.dispatch.slurm.submission import folder, job_name
from klab.harness.dispatch.slurm.task import MAX_REQUEUES, REQUEUE_CODE, ArrayTask
from klab.harness.store import Run
from klab.harness.training.distributed.network import MINUTES_VARIABLE

if TYPE_CHECKING:
    from submitit import SlurmExecutor

_SHIELD = 'trap "" USR2 TERM; exec "$@"'
"""A signal that arrives while Python is starting must not end the job."""

_FULL = ("submit limit", "MaxSubmit", "temporarily unable to accept job")


class SubmissionRefused(RuntimeError):
    """Slurm does not accept the job. `full`: it would accept a smaller one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.full = any(word in text for word in _FULL)


@dataclass(frozen=True, slots=True)
class ArrayJob:
    """One array: submission `number` of a run, whose task i trains `cells[i]`, `parallel` of them at a time.

    Attributes:
        resources: of each task, with the user's options of sbatch still to be applied.
        after: the job that has to end first.
        gres: whether the cluster wants GPUs asked for by `--gres`.
    """

    run: Run
    number: int
    cells: tuple[tuple[str, ...], ...]
    resources: Resources
    parallel: int
    after: str | None = None
    name: str = ""
    gres: bool = False

    @property
    def folder(self) -> Path:
        return folder(self.run.jobs, self.number)


def sbatch_script(job: ArrayJob) -> str:
    """The text for sbatch."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{_shielded_python(job)} -u -m submitit.core._submit {shlex.quote(str(job.folder))}"
    elements = len(job.cells) if len(job.cells) > 1 else None
    text: str = _make_sbatch_string(command, job.folder, map_count=elements, **submitit_parameters(job))
    return text


def submit(job: ArrayJob) -> str:
    """Submit the array and return its job id.

    Raises:
        SubmissionRefused: when Slurm does not accept it; nothing is in its queue then.
        SlurmUnavailable: when it is not known whether Slurm accepted it.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = _executor(job)
    wanted = with_user_options(job.resources)
    grace, processes = signal_delay(wanted.minutes) / 2, processes_per_job(wanted)
    ranks = ranks_per_node(wanted)
    array_tasks = [ArrayTask(str(job.run.path), cells, wanted.cpus, grace, processes, ranks) for cells in job.cells]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats sbatch's words there
            jobs = executor.submit_array(array_tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        identity = client.find_jobs([job.name]).get(job.name)  # a lost answer is not a refusal
        if identity is None:
            raise SubmissionRefused(_sbatch_message(str(error))) from error
        return identity
    return str(jobs[0].job_id).split("_")[0]


def submitit_parameters(job: ArrayJob) -> dict[str, Any]:
    """submitit's parameters for a job array."""
    wanted = with_user_options(job.resources)
    single = len(job.cells) == 1
    logs = {stream: _log_pattern(job, stream, single) for stream in ("out", "err")}
    given: dict[str, Any] = {
        "job_name": job.name or job_name(job.run.name, job.number),
        "time": wanted.minutes,
        "nodes": wanted.nodes,
        "dependency": f"afterany:{job.after}" if job.after else None,
        "signal_delay_s": signal_delay(wanted.minutes),
        "array_parallelism": job.parallel,
        "setup": [_INHERIT_CPUS, *wanted.setup, *_exchange(wanted), *_repair(job)],
        "srun_args": ["--output", logs["out"], "--error", logs["err"]],
        "additional_parameters": {
            "requeue": True,
            "output": logs["out"].replace("%t", "0"),
            "error": logs["err"].replace("%t", "0"),
            **sbatch_options(wanted, gres=job.gres),
        },
        "wckey": None,
    }
    if wanted.container:
        given["teardown"] = _REQUEUE_OUTSIDE
    if processes_per_job(wanted) > 1:  # one that dies takes the others with it
        given["ntasks_per_node"] = 1 if wanted.launcher else wanted.processes_per_node
        given["srun_args"].append("--kill-on-bad-exit=1")
    return given


def _exchange(wanted: Resources) -> list[str]:
    """Shell lines that say how the processes of a job exchange numbers."""
    if processes_per_job(wanted) == 1:
        return []
    lines = [f"export {MINUTES_VARIABLE}={wanted.collective_minutes}"]
    if wanted.interface is not None:
        lines.append(f"export GLOO_SOCKET_IFNAME={wanted.interface} NCCL_SOCKET_IFNAME=={wanted.interface}")
    return lines


def processes_per_job(resources: Resources) -> int:
    """The tasks of a job, over all of its nodes, which train together: a process each, or, with a launcher, a node."""
    return resources.nodes * (1 if resources.launcher else resources.processes_per_node)


def ranks_per_node(resources: Resources) -> int:
    """The processes that a launcher starts on each node; 0 without one."""
    return resources.processes_per_node if resources.launcher else 0


def signal_delay(minutes: int) -> int:
    """Seconds before the time limit at which a job saves and requeues itself: a quarter of it, at most 120."""
    return max(10, min(120, minutes * 15))


_INHERIT_CPUS = 'test -z "$SLURM_CPUS_PER_TASK" || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
"""From Slurm 22.05 on srun does not take over the cores per task that sbatch was given."""

_REQUEUE_OUTSIDE = [
    "status=$?",
    f'if test "$status" -eq {REQUEUE_CODE} && scontrol show job -o "$SLURM_JOB_ID" |',
    '  grep -F " JobName=$SLURM_JOB_NAME " | grep -q JobState=RUNNING; then',
    '  scontrol requeue "$SLURM_JOB_ID" && exit 0',
    "fi",
    'exit "$status"',
]
"""In a container there is no scontrol: the script requeues the job when its process asks for it by its exit code."""


def _log_pattern(job: ArrayJob, stream: str, single: bool) -> str:
    """Where a task's output goes, in Slurm's notation: a % of the path itself is doubled."""
    folder_ = str(job.folder).replace("%", "%%")
    return f"{folder_}/{'%j' if single else '%A_%a'}_%t_log.{stream}"


def _executor(job: ArrayJob) -> SlurmExecutor:
    from submitit import SlurmExecutor

    try:
        executor = SlurmExecutor(job.folder, max_num_timeout=MAX_REQUEUES, python=_shielded_python(job))
    except RuntimeError as error:
        raise UserError("there is no srun here", hint="Launch on a login node, or choose --on local.") from error
    executor.update_parameters(**submitit_parameters(job))
    return executor


def _shielded_python(job: ArrayJob) -> str:
    return shlex.join(["sh", "-c", _SHIELD, "klab", *_python(job)])


def _python(job: ArrayJob) -> list[str]:
    """The words that start Python on a node: this interpreter, the one that `resources` names, or one in a container.

    A container sees the folder that holds the run, and GPUs where the job has some.
    """
    wanted = with_user_options(job.resources)
    own, *options = python_command()
    if wanted.container is None:
        return [wanted.python or own, *options]
    gpus = ["--nv"] if wanted.gpus else []
    command = ["apptainer", "exec", *gpus, "--bind", str(job.run.path.parent), wanted.container]
    return [*command, wanted.python or "python3", *options]


def _repair(job: ArrayJob) -> list[str]:
    """Shell lines that write the job's pickle if its launcher died before it had."""
    pickle = f"{shlex.quote(str(job.folder))}/$job'_submitted.pkl'"
    python, run = shlex.join(_python(job)), shlex.quote(str(job.run.path))
    return [
        "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        f"rm -f {pickle}.save_tmp",
        f"test -e {pickle} || {python} -m klab.harness.dispatch.slurm.task {run} {job.number}",
    ]


def _sbatch_message(text: str) -> str:
    """sbatch's own complaint out of submitit's message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in lines if line.startswith("sbatch:")]
    return "; ".join(said) or (lines[-1] if lines else "sbatch failed without a message")
