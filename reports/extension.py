"""Which cells of a study get more seeds, and what that does to its error rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from klab.grid import Cell, UserError
from klab.harness.store.looks import looks, most_seeds
from klab.reports.claims import Judged, judged
from klab.reports.comparison import compare
from klab.reports.conduct import spending_of, stop_of
from klab.reports.inference import UNDECIDED
from klab.reports.inference.error_rate import look_share
from klab.reports.study import Study


@dataclass(frozen=True)
class Extension:
    """More seeds for some configurations of a run.

    Attributes:
        groups: the configurations, the baselines among them.
        cells: their cells with the new seeds.
        seeds: the new seeds.
        most: seeds per cell that there will be at most.
        level: the error rate of everything at the look that then comes.
        open: how many contrasts were open; None where that was not asked.
        claims: how many claims were undecided; 0 where that was not asked.
    """

    groups: tuple[str, ...]
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    most: int
    level: float
    open: int | None
    claims: int = 0


def extension(study: Study, count: int, most: int | None = None, undecided: bool = False) -> Extension:
    """The extension of a study of one run by `count` seeds per cell.

    Contrasts are judged at the level that their look has once there is to be another one: a difference that only
    stands at the full error rate is still open.

    Args:
        most: seeds per cell that there will be at most; None: as stated or said before, else no more than then.
        undecided: only for configurations whose comparison with the baseline is open (of those that were stated
            beforehand, if any), for the baselines, and for both sides of claims that are undecided.

    Raises:
        UserError: the study would have more seeds than were said to be the most, or nothing to add them to.
    """
    (run,) = study.runs
    taken, stop = looks(run.manifest), stop_of(study.conduct.versions[0][1])
    known = stop.seeds if stop is not None else most_seeds(run.manifest)
    after = taken[-1] + count
    if known is not None and most is not None and most != known:
        raise UserError(
            f"the most seeds per cell are {known}: the error rate is spent by that number",
            key="--most",
            value=most,
        )
    limit = known or most or after
    if after > limit:
        left = limit - taken[-1]
        raise UserError(
            f"the run has {taken[-1]} seeds per cell and the error rate is spent by {limit}",
            key="--seeds",
            value=count,
            hint=f"Add {left} at most." if left > 0 else "`klab confirm` judges the best cells anew, with fresh seeds.",
        )
    spending = spending_of(study.conduct.versions[0][1])
    groups, open_, claims = tuple(study.configurations), None, 0
    if undecided:
        share = look_share(taken, limit, spending)
        found = _open(study, share)
        claimed = [each for each in judged(study, share=share) if each.verdict == UNDECIDED]
        open_, claims = len(found), len(claimed)
        bases = set(study.baselines.values()) if found else set()
        wanted = found | bases | _claimed(study, claimed)
        groups = tuple(group for group in groups if group in wanted)
    if run.tuned is not None and run.tuned.untuned:
        written = {group: arm for each in study.arms for arm, group in each.groups.items()}
        groups = tuple(dict.fromkeys([*groups, *(written[group] for group in groups if group in written)]))
    used = {int(run.resolved(identity)["seed"]) for identity in run.cells}
    start = max(run.manifest["seeds"]) + 1
    seeds: list[int] = []
    while len(seeds) < count:
        if start not in used:
            seeds.append(start)
        start += 1
    first = {str(run.resolved(identity)["group"]): identity for identity in reversed(run.cells)}
    cells = [cell for group in groups for cell in run.cell(first[group]).cell().with_seeds(seeds)]
    level = 0.05 * look_share((*taken, after), limit, spending)
    return Extension(groups, tuple(cells), tuple(seeds), limit, level, open_, claims)


def _open(study: Study, share: float) -> set[str]:
    """Configurations whose comparison with the baseline is undecided at a look with this share of the error rate."""
    found: set[str] = set()
    for task in study.tasks:
        table = compare(study, task, share=share).table
        wanted = table["stated"] if table["stated"].any() else table["group"] != study.baselines.get(task)
        found |= set(table.loc[wanted & (table["verdict"] == UNDECIDED), "group"])
    return found


def _claimed(study: Study, claims: Sequence[Judged]) -> set[str]:
    """Both sides of undecided claims, on the tasks on which they are open."""
    task_of = dict(zip(study.cells["group"], study.cells["task"], strict=True))
    found: set[str] = set()
    for claim in claims:
        tasks = {row.task for row in claim.rows if row.verdict == UNDECIDED}
        found |= {group for group in (*claim.cells, *claim.against) if task_of[group] in tasks}
    return found
