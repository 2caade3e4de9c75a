"""Launching a run: submit the cells that need it. Repeating a launch keeps results and leaves running cells alone."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from klab.grid import UserError
from klab.grid.schema.budget import Budget
from klab.grid.schema.sections import Resources
from klab.harness.dispatch.backends import Executor, Pack
from klab.harness.dispatch.budget import (
    WHO,
    Price,
    Verdict,
    forecast,
    held_by_budget,
    hold_beyond,
    judge,
    refuse_nothing_left,
)
from klab.harness.dispatch.local.backend import LocalExecutor
from klab.harness.dispatch.packing.packs import make_packs
from klab.harness.dispatch.packing.plan import plan_packs
from klab.harness.dispatch.packing.step_times import HardwareKey
from klab.harness.dispatch.status import CellStatus, statuses
from klab.harness.dispatch.tuning import pending, resume, settle
from klab.harness.store import Run, machine
from klab.harness.store.usage import Usage, used

_PATTERNS = ("%j", "%t", "%A", "%a")
"""What submitit replaces in the paths of its files, wherever it stands in them."""


@dataclass(frozen=True, slots=True)
class LaunchResult:
    """The packs that a launch submitted, the states of all cells just before, and what a budget left of them."""

    packs: tuple[Pack, ...]
    before: tuple[CellStatus, ...]
    verdict: Verdict | None = None


def launch(
    run: Run,
    executor: Executor,
    *,
    workers: int,
    retry_failed: bool = False,
    cells_per_job: int | None = None,
    resources: Resources | None = None,
    others: Iterable[Executor] | None = None,
    only: Collection[str] | None = None,
) -> LaunchResult:
    """Submit every cell that has no result, is not running, and is in no queue.

    Args:
        workers: jobs that will run at the same time; decides how cells are packed.
        retry_failed: also run failed cells again.
        cells_per_job: overrides the grid file's `resources.cells_per_job`.
        resources: what each job gets; None: what the grid file asks for.
        others: executors to ask about queued cells; None: those of the run.
        only: ids to take up; None: all. What is queued stays queued. Cells that the run got after a launch are always
            taken up.

    The second stage of a tuned run follows by itself: here and in the local pool when the first has ended, on Slurm in
    jobs that wait for those of the first.

    Where the run has a budget, packs that are expected to go beyond it are not submitted and their cells held; a later
    launch takes them up where there is room.

    Raises:
        UserError: when the path of the run folder cannot be used, code, data or models are not those that the run was
            made with, the budget leaves no room for any cell, or the executor refuses the jobs.
    """
    if executor.name != "here":
        _check_path(run)
    with run.lock("launching"):
        settle(run)
        before = statuses(run, others)
        later, wanted = pending(run), None if only is None else {*only, *run.grown}
        chosen = [
            row
            for row in before
            if (should_submit(row, executor.name, retry_failed) or held_by_budget(run, row.id))
            and (wanted is None or row.id in wanted or row.id in later or row.state == "queued")
        ]
        if chosen:
            run.refuse_changed_inputs()
        resume(run, [row.id for row in chosen if row.id in later and row.state == "cancelled"])
        waiting = [row.id for row in chosen if row.id in later]
        chosen = [row for row in chosen if row.id not in later]
        verdict = None
        asked = resources or run.resources
        size = cells_per_job or asked.cells_per_job or run.resources.cells_per_job
        hardware = HardwareKey.for_launch(executor.name, asked, getattr(executor, "device", None))
        packs = list(plan_packs(run, [row.id for row in chosen], workers, size, hardware))
        if run.budget is not None:
            verdict = within_budget(run, executor, packs, before, asked, workers)
            refuse_nothing_left(verdict)
            packs = list(verdict.kept)
            chosen = _follow(run, chosen, verdict, run.budget)
        for row in chosen:
            if row.state in ("failed", "cancelled"):
                folder = run.cell(row.id)
                folder.clear_failure()
                folder.append_attempt({"event": "relaunched", "at": time.time(), "was": row.state})
        given = asked.model_copy(update={"cells_per_job": size})
        if executor.name == "slurm" and waiting:
            packs += make_packs({name: later[name] for name in waiting}, size, workers).packs
        if packs:
            executor.submit(run, packs, given)
        if executor.name == "here" and not getattr(executor, "interrupted", False) and (more := settle(run)):
            second = plan_packs(run, more, workers, size, hardware)
            executor.submit(run, second, given)
            packs += second
    return LaunchResult(tuple(packs), tuple(before), verdict)


def within_budget(
    run: Run,
    executor: Executor,
    packs: Sequence[Pack],
    rows: Iterable[CellStatus],
    asked: Resources,
    workers: int,
) -> Verdict:
    """Which packs the run's budget has room for, after what was used and what already runs or stands in a queue.

    Args:
        rows: the run's statuses.
        asked: what each job gets, before a profile and flags of Slurm's.
    """
    assert run.budget is not None
    price = price_of(executor, asked)
    submitted = {cell for pack in packs for cell in pack.cells}
    going = [row for row in rows if row.state in ("running", "queued", "preempted") and row.id not in submitted]
    known = set(run.cells)
    resolved = {row.id: run.resolved(row.id) for row in going if row.id in known}
    singles = [Pack((name,)) for name in resolved]
    left = {row.id: 1 - row.update / max(1, row.updates) for row in going}
    ahead = Usage()
    if found := forecast(resolved, singles, run.path.parent, price, workers):
        measured = not found.source.startswith("at most")
        for name, seconds in zip(resolved, found.seconds, strict=True):
            ahead += price.of(seconds * (left[name] if measured else 1.0))
    cells = {name: run.resolved(name) for pack in packs for name in pack.cells}
    expected = forecast(cells, packs, run.path.parent, price, workers) if packs else None
    return judge(run.budget, packs, expected, used(run), ahead)


def price_of(executor: Executor, asked: Resources) -> Price:
    """What a job takes of the machines where the executor runs it."""
    if executor.name == "slurm":
        from klab.harness.dispatch.slurm.backend import SlurmExecutor

        assert isinstance(executor, SlurmExecutor)
        return Price.on_slurm(executor.resources(asked))
    local = LocalExecutor(device=getattr(executor, "device", None))
    processes = local.processes(asked)
    return Price(processes if local.gpus() else 0, min(asked.cpus, machine.cores()) * processes)


def _follow(run: Run, chosen: Sequence[CellStatus], verdict: Verdict, budget: Budget) -> list[CellStatus]:
    """Hold the cells that are beyond the budget, and release those that it had held and has room for now; the latter
    and others that are to be submitted."""
    beyond = {cell for pack in verdict.beyond for cell in pack.cells}
    hold_beyond(run, [row.id for row in chosen if row.id in beyond and row.state != "held"], budget)
    kept = [row for row in chosen if row.id not in beyond]
    for row in kept:
        if row.state == "held":
            run.cell(row.id).append_attempt({"event": "released", "at": time.time(), "by": WHO})
    return kept


def refuse_changed_inputs(run: Run, executor: str, retry_failed: bool, only: Collection[str]) -> None:
    """Raises UserError where `launch` would: it would submit cells under other code, data or models than the run's."""
    if run.changed_inputs(missing=False) and any(
        row.id in only and should_submit(row, executor, retry_failed) for row in statuses(run)
    ):
        run.refuse_changed_inputs()


def _check_path(run: Run) -> None:
    """Refuse a run folder whose path submitit, which writes the files of jobs, would change.

    Raises:
        UserError: naming what stands in the path.
    """
    found = [pattern for pattern in _PATTERNS if pattern in str(run.path)]
    if found:
        raise UserError(
            f"has {found[0]} in its path, which submitit replaces by a job's number",
            file=run.path,
            hint="Choose another place with --runs.",
        )


def should_submit(row: CellStatus, executor: str, retry_failed: bool) -> bool:
    """Whether a launch submits the cell. The local queue is built anew by each launch, a scheduler's is left alone."""
    if row.state == "failed":
        return retry_failed
    if row.state == "queued":
        return executor == "local" and row.executor == "local" and not row.job
    if row.state == "preempted":
        return not row.job  # otherwise a scheduler has requeued it
    return row.state in ("waiting", "lost", "cancelled")
