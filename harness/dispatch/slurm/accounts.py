"""What Slurm's accounts say of jobs that its queue no longer lists: how they ended, or that Slurm has forgotten them.

A controller that dies and starts with an older state, or none, knows nothing of the jobs submitted since. Their records
stay as they were, waiting or running for ever, and their numbers are given to other jobs. Hence a job is known by its
number and its name, and what the accounts call alive without the queue listing it is taken for forgotten.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from klab.harness.dispatch.backends import JobStatus
from klab.harness.dispatch.slurm.client import (
    NoAccounting,
    SlurmUnavailable,
    expand_array_id,
    job_status,
    run_command,
    whole_number,
)
from klab.harness.dispatch.slurm.submission import Submission
from klab.harness.store import Run, scan

FORGOTTEN = "Slurm has forgotten its job; launch again"

_ALIVE = ("queued", "held", "running", "preempted")


def states_from_accounts(
    run: Run, unlisted: Mapping[str, tuple[Submission, int]], listed: Collection[str]
) -> dict[str, JobStatus]:
    """Cell -> state of its job, of cells without a result whose jobs squeue, which answered, does not list.

    Args:
        listed: names of arrays of which squeue lists other tasks.
    """
    results = scan(run, unlisted) if unlisted else {}
    wanted = {cell: place for cell, place in unlisted.items() if results[cell].result is None}
    jobs = {each.name: each.job for each, _ in wanted.values() if each.job is not None}
    try:
        accounts = sacct_states(jobs)
    except NoAccounting:
        return {}
    except SlurmUnavailable as error:
        return {cell: JobStatus("unknown", each.job or "", str(error)) for cell, (each, _) in wanted.items()}
    recorded = {name for name, _ in accounts}
    forgotten = {name for (name, _), state in accounts.items() if state.state in _ALIVE} - set(listed)
    found = {}
    for cell, (each, index) in wanted.items():
        if each.job is None or each.name not in recorded:
            continue
        element = each.element(index)
        state = accounts.get((each.name, element))
        if state is not None and state.state not in _ALIVE:
            found[cell] = state
        elif state is not None or each.name in forgotten:
            found[cell] = JobStatus("ended", element, FORGOTTEN)
        else:  # Slurm forgets a task that is cancelled while its array waits
            found[cell] = JobStatus("cancelled", element, "taken out of the queue")
    return found


def sacct_states(jobs: Mapping[str, str]) -> dict[tuple[str, str], JobStatus]:
    """Name and job or array element -> its last record in the accounts.

    Args:
        jobs: name -> job.

    Raises:
        NoAccounting: when the cluster keeps none.
        SlurmUnavailable: when they cannot be asked now.
    """
    found: dict[tuple[str, str], JobStatus] = {}
    if not jobs:
        return found
    which = ("-j", ",".join(sorted(set(jobs.values()))), f"--name={','.join(jobs)}")
    text = run_command("sacct", "-n", "-P", "-X", *which, "-o", "JobName,JobID,State,ExitCode,Reason")
    for line in text.splitlines():
        if line.count("|") < 4:
            continue
        name, identity, word, code, reason = line.split("|", 4)
        exit_code, _, number = code.partition(":")
        ended, killed = whole_number(exit_code), whole_number(number)
        state = job_status(word, job=identity, reason=reason, exit_code=ended, signal=killed)
        for element in expand_array_id(identity):
            if element.split("_")[0] == jobs.get(name):
                found[name, element] = state
    return found
