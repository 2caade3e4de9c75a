"""Slurm as an executor: packs become tasks of job arrays, and one query tells the states of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from klab.grid import UserError
from klab.grid.schema.sections import Resources
from klab.harness.dispatch.backends import JobStatus, Pack
from klab.harness.dispatch.profiles import resolve_resources
from klab.harness.dispatch.slurm import array_job, client
from klab.harness.dispatch.slurm.accounts import states_from_accounts
from klab.harness.dispatch.slurm.array_plan import Chunk, split_into_arrays
from klab.harness.dispatch.slurm.client import SlurmUnavailable
from klab.harness.dispatch.slurm.options import with_user_options
from klab.harness.dispatch.slurm.submission import Submission, next_number, record_intent, submissions
from klab.harness.dispatch.tuning import second_stage_names
from klab.harness.store import Run, scan

_LIVE = ("queued", "held", "running", "preempted", "unknown")
"""States of jobs that are still in Slurm's queue, or may be."""


class SlurmExecutor:
    """Jobs on a Slurm cluster, submitted from one of its login nodes.

    Args:
        flags: resources from the command line; they win over the profile's, which win over the grid file's.
        profile: a named profile of the user's, instead of the one that the grid file names.
    """

    name = "slurm"

    def __init__(self, flags: Mapping[str, Any] | None = None, profile: str | None = None) -> None:
        self.flags = dict(flags or {})
        self.profile = profile

    def resources(self, given: Resources) -> Resources:
        """What a job gets.

        Raises:
            UserError: when a value is not valid, there is no such profile, or klab sets an option itself.
        """
        return with_user_options(resolve_resources(given, self.flags, profile=self.profile))

    def scripts(self, run: Run, packs: Sequence[Pack], given: Resources) -> list[str]:
        """The scripts that `submit` would give to sbatch, for a cluster's limits where Slurm answers; writes nothing.

        Job names end in random letters, and an array that waits for another one names that one's position.
        """
        resources = self.resources(given)
        _require_launcher(run, packs, resources)
        try:
            limits = client.cluster_limits()
        except SlurmUnavailable:
            limits = client.Limits(client.DEFAULT_ARRAY, "")
        number = next_number(run.jobs)
        found: list[str] = []
        for stage in _by_stage(run, packs):
            before = [f"<job of script {place + 1}>" for place in range(len(found))]
            for chunk in split_into_arrays(len(stage), limits.array, resources.max_parallel):
                after = before if chunk.after is None else [f"<job of script {len(before) + chunk.after + 1}>"]
                cells = tuple(pack.cells for pack in stage[chunk.first : chunk.first + chunk.count])
                job = array_job.ArrayJob(
                    run,
                    number + len(found),
                    cells,
                    resources,
                    chunk.parallel,
                    ":".join(after) or None,
                    gres=limits.gres,
                )
                found.append(array_job.sbatch_script(job))
        return found

    def submit(self, run: Run, packs: Sequence[Pack], resources: Any) -> None:
        """Submit the packs as job arrays. Called under the run's lock.

        Packs of cells whose settings tuning has still to choose wait for all jobs of the first stage.

        Jobs that an earlier launcher submitted but did not record are adopted, and their cells are left out.

        Raises:
            UserError: when Slurm does not answer or refuses; what was submitted until then stays submitted.
        """
        resources = self.resources(resources)
        _require_launcher(run, packs, resources)
        try:
            limits = client.cluster_limits()
            packs = self._without_living(run, packs)
        except SlurmUnavailable as error:
            raise _unavailable(error) from error
        counter = _Progress(len(packs))
        first, second = _by_stage(run, packs)
        jobs = self._submit_arrays(run, first, resources, limits, counter, ())
        if second:
            self._submit_arrays(run, second, resources, limits, counter, (*self._living(run), *jobs))

    def _submit_arrays(
        self,
        run: Run,
        packs: Sequence[Pack],
        resources: Resources,
        limits: client.Limits,
        counter: _Progress,
        before: Sequence[str],
    ) -> list[str]:
        """Submit packs as arrays, all of which wait for the jobs `before`."""
        jobs: list[str] = []
        for chunk in split_into_arrays(len(packs), limits.array, resources.max_parallel):
            after = before if chunk.after is None else [jobs[chunk.after]]
            jobs.append(self._submit(run, packs, chunk, resources, ":".join(dict.fromkeys(after)), limits, counter))
        return jobs

    def _living(self, run: Run) -> list[str]:
        """The arrays in the queue that hold cells of the run's first stage."""
        states = self.states(run)
        jobs = (state.job for cell, state in states.items() if state.state in _LIVE and cell in run.manifest["cells"])
        return list(dict.fromkeys(job.split("_")[0] for job in jobs if job))

    def states(self, run: Run) -> dict[str, JobStatus]:
        """The status of each cell's newest job: one squeue, and one sacct for jobs that squeue no longer lists."""
        newest: dict[str, tuple[Submission, int]] = {}
        for each in submissions(run):
            newest.update({cell: (each, index) for index, cells in enumerate(each.cells) for cell in cells})
        orphans = {each.name: each for each, _ in newest.values() if each.job is None}
        if not newest:
            return {}
        try:
            queue = client.query_queue({each.name for each, _ in newest.values()})
        except SlurmUnavailable as error:
            return {cell: JobStatus("unknown", each.job or "", str(error)) for cell, (each, _) in newest.items()}
        for name in orphans.keys() & queue.jobs.keys() if not run.read_only else ():
            with suppress(OSError):  # it will be found by its name again
                replace(orphans[name], job=queue.jobs[name]).write()
        found: dict[str, JobStatus] = {}
        unlisted: dict[str, tuple[Submission, int]] = {}
        for cell, (each, index) in newest.items():
            known = replace(each, job=each.job or queue.jobs.get(each.name))
            state = queue.states.get((known.name, known.element(index))) if known.job else None
            if state is not None:
                found[cell] = state
            else:
                unlisted[cell] = (known, index)
        found.update(states_from_accounts(run, unlisted, queue.jobs))
        for name, cell in second_stage_names(run).items():  # submitted before its settings were chosen
            if name in found:
                found[cell] = found.get(cell, found[name])
                del found[name]
        return found

    def cancel(self, run: Run, cell_ids: Iterable[str]) -> None:
        """Take jobs out of the queue, or end them, whose cells are all cancelled or done; other jobs go on.

        Raises:
            UserError: when Slurm does not answer.
        """
        chosen = set(cell_ids)
        states = self.states(run)
        silent = [cell for cell in chosen if cell in states and states[cell].state == "unknown"]
        if silent:
            raise _unavailable(SlurmUnavailable(states[silent[0]].reason))
        jobs = {states[cell].job for cell in chosen if cell in states and states[cell].state in _LIVE}
        mates: dict[str, list[str]] = {job: [] for job in jobs if job}
        for cell, state in states.items():
            if state.job in mates:
                mates[state.job].append(cell)
        ends = [job for job, cells in mates.items() if not _has_other_open_cells(run, cells, chosen)]
        if ends:
            try:
                client.cancel_jobs(ends)
            except SlurmUnavailable as error:
                raise _unavailable(error) from error

    def hold(self, run: Run, cell_ids: Iterable[str]) -> None:
        """Hold the waiting jobs whose open cells are all held; a job with others starts, and leaves held ones alone.

        Raises:
            UserError: when Slurm does not answer.
        """
        jobs = self._jobs(run, set(cell_ids), ("queued", "preempted"))
        try:
            client.hold_jobs([job for job, cells in jobs.items() if not _has_other_open_cells(run, cells, set())])
        except SlurmUnavailable as error:
            raise _unavailable(error) from error

    def release(self, run: Run, cell_ids: Iterable[str]) -> set[str]:
        """Release held jobs, and count cells whose jobs still wait.

        Raises:
            UserError: when Slurm does not answer, or refuses: the hold is an administrator's, say.
        """
        chosen = set(cell_ids)
        held = self._jobs(run, chosen, ("held",))
        waiting = self._jobs(run, chosen, ("queued", "preempted"))
        try:
            client.release_jobs(list(held))
        except SlurmUnavailable as error:
            raise _unavailable(error) from error
        return chosen & {cell for jobs in (held, waiting) for cells in jobs.values() for cell in cells}

    def _jobs(self, run: Run, chosen: set[str], wanted: Sequence[str]) -> dict[str, list[str]]:
        """The jobs in one of these states that have one of these cells, and all cells of each."""
        states = self.states(run)
        if (silent := next((states[cell] for cell in chosen if cell in states), None)) and silent.state == "unknown":
            raise _unavailable(SlurmUnavailable(silent.reason))
        jobs: dict[str, list[str]] = {}
        for cell in chosen:
            if cell in states and states[cell].state in wanted and states[cell].job:
                jobs.setdefault(states[cell].job, [])
        for cell, state in states.items():
            if state.job in jobs:
                jobs[state.job].append(cell)
        return jobs

    def _submit(
        self,
        run: Run,
        packs: Sequence[Pack],
        chunk: Chunk,
        resources: Resources,
        after: str,
        limits: client.Limits,
        counter: _Progress,
    ) -> str:
        """Submit one array; in halves, one after the other, where it exceeds what the user may have in the queue."""
        part = packs[chunk.first : chunk.first + chunk.count]
        intent = record_intent(
            run,
            part,
            cluster=limits.cluster,
            threads=resources.cpus,
            processes=array_job.processes_per_job(resources),
            ranks=array_job.ranks_per_node(resources),
        )
        array = array_job.ArrayJob(
            run, intent.number, intent.cells, resources, chunk.parallel, after or None, intent.name, limits.gres
        )
        try:
            job = array_job.submit(array)
        except array_job.SubmissionRefused as refusal:
            intent.forget()
            if not refusal.full or chunk.count == 1:
                raise counter.stopped(str(refusal)) from refusal
            half = chunk.count // 2
            front = replace(chunk, count=half)
            back = replace(chunk, first=chunk.first + half, count=chunk.count - half)
            after = self._submit(run, packs, front, resources, after, limits, counter)
            return self._submit(run, packs, back, resources, after, limits, counter)
        except SlurmUnavailable as error:
            raise _unavailable(error) from error
        replace(intent, job=job).write()
        counter.done += chunk.count
        return job

    def _without_living(self, run: Run, packs: Sequence[Pack]) -> list[Pack]:
        """The packs without the cells of jobs in the queue; a job that was not recorded yet is recorded now."""
        open_ = [each for each in submissions(run) if each.job is None]
        known = client.find_jobs([each.name for each in open_]) if open_ else {}
        for each in open_:
            if each.name in known:
                replace(each, job=known[each.name]).write()
            else:
                each.forget()
        busy = {cell for cell, state in self.states(run).items() if state.state in _LIVE}
        left = (tuple(cell for cell in pack.cells if cell not in busy) for pack in packs)
        return [Pack(cells) for cells in left if cells]


def _by_stage(run: Run, packs: Sequence[Pack]) -> tuple[list[Pack], list[Pack]]:
    """The packs of cells that are known, and those of cells whose settings are still to be chosen."""
    known = [all(cell in run.manifest["cells"] for cell in pack.cells) for pack in packs]
    first = [pack for pack, is_known in zip(packs, known, strict=True) if is_known]
    return first, [pack for pack, is_known in zip(packs, known, strict=True) if not is_known]


class _Progress:
    """How many packs of a launch are submitted."""

    def __init__(self, all_: int) -> None:
        self.all = all_
        self.done = 0

    def stopped(self, text: str) -> UserError:
        hint = f"{self.done} of {self.all} jobs were submitted; launch again for the rest." if self.done else None
        return UserError(f"Slurm refused the job: {text}", hint=hint)


def _require_launcher(run: Run, packs: Sequence[Pack], resources: Resources) -> None:
    """Raises UserError where several processes are asked for, and nothing would start those of cells on TRL."""
    if array_job.processes_per_job(resources) == 1 or resources.launcher is not None:
        return
    for cell in (cell for pack in packs for cell in pack.cells):
        if run.manifest["cells"][cell]["training"].get("engine") == "trl":
            raise UserError(
                "is missing: several processes train each cell of training.engine: trl",
                key="resources.launcher",
                hint="Write launcher: torchrun, or launcher: {accelerate: FILE}.",
            )


def _has_other_open_cells(run: Run, cells: Sequence[str], chosen: set[str]) -> bool:
    """Whether a job has cells that still want to run."""
    snapshots = scan(run, [cell for cell in cells if cell not in chosen])
    return any(each.result is None and not (each.failed or each.cancelled or each.held) for each in snapshots.values())


def _unavailable(error: SlurmUnavailable) -> UserError:
    return UserError(
        f"Slurm does not answer: {error}",
        hint="Nothing is lost: jobs in the queue go on, and launching again submits what is missing.",
    )
