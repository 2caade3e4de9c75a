"""Client of Slurm's commands: one `squeue` for all jobs; what it no longer lists is looked up in `accounts.py`.

A command that fails, or does not answer in time, raises `SlurmUnavailable`: never evidence that a job failed.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from klab.harness.dispatch.backends import JobState, JobStatus

ANSWER_SECONDS = 15.0
DEFAULT_ARRAY = 1001
"""Slurm's default of MaxArraySize."""

_RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED")
_HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_HELD_REASONS = ("jobhelduser", "jobheldadmin", "job requeued in held state", "launch failed requeued held")
"""Reasons of pending jobs that wait for `scontrol release`."""
_TOO_LATE = ("no longer pending", "Invalid job id", "not supported on job", "already completing or completed")
"""What scontrol says where a job that is to be held has started, or ended."""
_ERRORS = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED")
# fixed widths: a name or a reason may contain any character
_COLUMNS = {"ArrayJobID": 20, "ArrayTaskID": 20, "State": 24, "Reason": 64, "TimeLeft": 20, "exit_code": 12}
_COLUMNS |= {"RestartCnt": 10, "Name": 256}


class SlurmUnavailable(RuntimeError):
    """Slurm could not be asked."""


class NoAccounting(SlurmUnavailable):
    """There is nothing to ask: the cluster keeps no accounts."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a cluster accepts.

    Attributes:
        array: tasks of one array.
        cluster: its name.
        gres: whether GPUs are asked for by `--gres`; `--gpus-per-node` needs the plugin select/cons_tres.
    """

    array: int
    cluster: str
    gres: bool = False


def cluster_limits() -> Limits:
    """What the cluster accepts.

    Raises:
        SlurmUnavailable: when the controller does not answer.
    """
    settings = dict(
        line.split("=", 1) for line in run_command("scontrol", "show", "config").splitlines() if "=" in line
    )
    settings = {name.strip(): value.strip() for name, value in settings.items()}
    array = int(settings.get("MaxArraySize", DEFAULT_ARRAY))
    tasks = re.search(r"max_array_tasks=(\d+)", settings.get("SchedulerParameters", ""))
    if tasks:
        array = min(array, int(tasks[1]))
    if array < 1:
        raise SlurmUnavailable("this cluster does not accept job arrays (MaxArraySize=0)")
    select = settings.get("SelectType", "select/cons_tres")
    return Limits(array, settings.get("ClusterName", ""), gres=select != "select/cons_tres")


@dataclass(frozen=True, slots=True)
class Queue:
    """squeue's answer: name and job or array element ("12", "12_3") -> state, and name -> job. Ended jobs stay a while.

    A number alone names no job: a controller that lost its state gives the same numbers again.
    """

    states: dict[tuple[str, str], JobStatus]
    jobs: dict[str, str]


def query_queue(names: Iterable[str]) -> Queue:
    """What squeue knows about the jobs of these names.

    Raises:
        SlurmUnavailable: when the controller does not answer.
    """
    rows = _rows(names)
    return Queue({(row.name, row.element): row.state() for row in rows}, {row.name: row.job for row in rows})


def find_jobs(names: Iterable[str]) -> dict[str, str]:
    """Job name -> job id, of whatever squeue or sacct know under these names.

    Raises:
        SlurmUnavailable: when one of them does not answer (a cluster without accounting has only squeue).
    """
    wanted = list(names)
    found = query_queue(wanted).jobs
    missing = [name for name in wanted if name not in found]
    if missing:
        try:
            text = run_command(
                "sacct", "-n", "-P", "-X", "-S", "now-30days", f"--name={','.join(missing)}", "-o", "JobName,JobID"
            )
        except NoAccounting:
            return found
        for line in text.splitlines():
            name, _, job = line.partition("|")
            found[name] = job.split("_")[0]
    return found


def imminent_end(job: str, name: str | None = None) -> str | None:
    """What is about to happen to this running job: "preempted", "ended", "running"; None without an answer.

    Args:
        name: the job's; where another one has its number, Slurm has forgotten it, and it ends.
    """
    try:
        text = run_command("scontrol", "show", "job", "-o", job)
    except SlurmUnavailable:
        return None
    state = re.search(r"\bJobState=(\w+)", text)
    preempted = re.search(r"\bPreemptTime=(\S+)", text)
    if state is None:
        return None
    if name and f" JobName={name} " not in text:
        return "ended"
    if state[1] != "RUNNING":
        return "ended"
    return "preempted" if preempted and preempted[1] not in ("None", "Unknown", "N/A") else "running"


def cancel_jobs(jobs: Sequence[str]) -> None:
    """Take jobs and array elements out of the queue, or end them.

    Raises:
        SlurmUnavailable: when the controller does not answer.
    """
    for start in range(0, len(jobs), 500):
        run_command("scancel", "--quiet", *jobs[start : start + 500])


def hold_jobs(jobs: Sequence[str]) -> None:
    """Keep waiting jobs and array elements from starting. One that has started meanwhile is left alone.

    Raises:
        SlurmUnavailable: when the controller does not answer.
    """
    for job in jobs:
        try:
            run_command("scontrol", "hold", job)
        except SlurmUnavailable as error:
            if not any(text in str(error) for text in _TOO_LATE):
                raise


def release_jobs(jobs: Sequence[str]) -> None:
    """Let held jobs and array elements start.

    Raises:
        SlurmUnavailable: when the controller does not answer, or refuses.
    """
    for job in jobs:
        run_command("scontrol", "release", job)


def job_status(
    word: str,
    *,
    job: str = "",
    reason: str = "",
    exit_code: int | None = None,
    signal: int | None = None,
    seconds_left: float | None = None,
    restarts: int = 0,
) -> JobStatus:
    """The status for Slurm's word for a state ("RUNNING", "CANCELLED by 1000", "OUT_OF_ME+")."""
    plain = word.split()[0].rstrip("+") if word.split() else ""
    reason = "" if reason == "None" else reason
    translated: JobState = "unknown"
    if _is(plain, _HELD) or (_is(plain, _WAITING) and reason.lower().replace("_", " ") in _HELD_REASONS):
        return JobStatus("held", job, reason or plain)
    if _is(plain, _WAITING):
        translated = "preempted" if restarts or plain.startswith("REQUEUE") else "queued"
        return JobStatus(translated, job, reason)
    if _is(plain, _RUNNING):
        return JobStatus("running", job, "" if plain == "RUNNING" else plain, seconds_left=seconds_left)
    if _is(plain, ("COMPLETED",)):
        translated = "ended"
    elif _is(plain, ("CANCELLED",)):
        translated = "cancelled"
    elif _is(plain, _ERRORS):
        translated = "failed"
        exit_code, signal = _ending(exit_code, signal)
    return JobStatus(translated, job, word.strip() if translated == "cancelled" else plain, exit_code, signal)


def expand_array_id(identity: str) -> Iterator[str]:
    """The elements that an id stands for: "12", "12_3", "12_[0-2,7%4]"."""
    found = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", identity)
    if found is None:
        yield identity
        return
    for part in found[2].split(","):
        low, _, high = part.partition("-")
        for number in range(int(low), int(high or low) + 1):
            yield f"{found[1]}_{number}"


def parse_duration(text: str) -> float | None:
    """A time in Slurm's notation ("2-03:04:05", "04:05", "UNLIMITED")."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+)", text.strip())
    if found is None:
        return None
    days, first, second, last = (int(part or 0) for part in found.groups())
    if found[3] is None:  # minutes:seconds
        return days * 86400 + first * 60 + last
    return days * 86400 + first * 3600 + second * 60 + last


def whole_number(text: str) -> int | None:
    """A number among Slurm's words; None where it is none."""
    return int(text) if text.strip().isdigit() else None


def run_command(*command: str) -> str:
    """Output of one of Slurm's commands.

    Raises:
        SlurmUnavailable: when it fails, does not end within `ANSWER_SECONDS`, or does not exist.
    """
    environment = {**os.environ, "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}
    for name in ("SQUEUE_FORMAT", "SQUEUE_FORMAT2", "SQUEUE_STATES", "SQUEUE_PARTITION", "SACCT_FORMAT"):
        environment.pop(name, None)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, env=environment)
    except FileNotFoundError as error:
        raise SlurmUnavailable(f"there is no {command[0]} here: is this a login node of a Slurm cluster?") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmUnavailable(f"{command[0]} did not answer within {ANSWER_SECONDS:.0f} s") from error
    if done.returncode:
        text = done.stderr.strip() or done.stdout.strip() or f"{command[0]} failed with exit code {done.returncode}"
        raise (NoAccounting if "accounting storage is disabled" in text else SlurmUnavailable)(text)
    return done.stdout


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of squeue."""

    job: str
    index: str
    word: str
    reason: str
    left: str
    status: str
    restarts: str
    name: str

    @property
    def element(self) -> str:
        return self.job if self.index in ("N/A", "") else f"{self.job}_{self.index}"

    def state(self) -> JobStatus:
        status = whole_number(self.status) or 0
        return job_status(
            self.word,
            job=self.element,
            reason=self.reason,
            exit_code=status >> 8,
            signal=status & 0x7F,
            seconds_left=parse_duration(self.left),
            restarts=whole_number(self.restarts) or 0,
        )


def _rows(names: Iterable[str]) -> list[_Row]:
    wanted = ",".join(names)
    if not wanted:
        return []
    format_ = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    which = ("-a", "-r", "-t", "all", "-u", str(os.getuid()), f"--name={wanted}")  # -a: hidden partitions, too
    text = run_command("squeue", "-h", *which, "-O", format_)
    return [_Row(*_cut(line)) for line in text.splitlines() if line.strip()]


def _cut(line: str) -> Iterator[str]:
    start = 0
    for width in _COLUMNS.values():
        yield line[start : start + width].strip()
        start += width


def _is(word: str, family: Sequence[str]) -> bool:
    """Whether a word, which sacct may have cut short, is one of a family."""
    return word in family or (len(word) >= 6 and any(member.startswith(word) for member in family))


def _ending(exit_code: int | None, signal: int | None) -> tuple[int | None, int | None]:
    """Exit code and signal, told apart also where a shell reported a signal as 128 + its number."""
    if not signal and exit_code is not None and 128 < exit_code < 160:
        return None, exit_code - 128
    return (None, signal) if signal else (exit_code, None)
