"""A study's budget: what packs are expected to take, which of them are beyond it, and what to change."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klab.grid import UserError
from klab.grid.schema.budget import UNITS, Budget
from klab.grid.schema.sections import Resources
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.packing.balance import START_SECONDS, makespan
from klab.harness.dispatch.packing.estimate import cell_seconds
from klab.harness.store import Run
from klab.harness.store.usage import Usage, shown, used

WHO = "budget"
"""The entry `by` of a hold that the budget made; a launch takes such cells up again."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a job takes of the machines while it runs.

    Attributes:
        gpus, cores: of all its nodes.
        limit: its time limit in seconds; None: it has none.
    """

    gpus: int
    cores: int
    limit: float | None = None

    @classmethod
    def on_slurm(cls, wanted: Resources) -> Price:
        return cls(wanted.gpus * wanted.nodes, wanted.cpus * wanted.processes_per_job, wanted.minutes * 60.0)

    def of(self, seconds: float) -> Usage:
        """What so many seconds of a job take; the clock is not counted here, since jobs run side by side."""
        return Usage(self.gpus * seconds / 3600, self.cores * seconds / 3600)


@dataclass(frozen=True)
class Forecast:
    """What packs are expected to take.

    Attributes:
        seconds: of each pack.
        source: where that comes from, in words.
    """

    price: Price
    seconds: tuple[float, ...]
    source: str
    workers: int

    def usage(self, packs: int | None = None) -> Usage:
        """Of the first so many packs; None: of all."""
        part = self.seconds[:packs]
        summed = self.price.of(sum(part))
        return Usage(summed.gpu_hours, summed.cpu_hours, makespan(part, self.workers) / 3600 if part else 0.0)


@dataclass(frozen=True)
class Verdict:
    """What a budget leaves of the packs of a launch.

    Attributes:
        kept, beyond: packs that fit, in order, and the others.
        used: what the run's attempts have used.
        going: what cells that run, or are in a queue, are still expected to take.
        wanted: what all packs together are expected to take; None: that is not known.
        source: where that comes from.
    """

    budget: Budget
    kept: tuple[Pack, ...]
    beyond: tuple[Pack, ...]
    used: Usage
    going: Usage
    wanted: Usage | None
    source: str

    @property
    def needed(self) -> dict[str, float]:
        """By limit that is too small for everything, what it would have to be."""
        if self.wanted is None:
            spent = {name: self.used.of(name) for name, limit in self.budget.limits.items()}
            return {name: value for name, value in spent.items() if value >= self.budget.limits[name]}
        whole = self.used + self.going + self.wanted
        return {name: whole.of(name) for name, limit in self.budget.limits.items() if whole.of(name) > limit}

    def lines(self, planned: bool = False) -> list[str]:
        """For people: what is used and expected, and what to change.

        Args:
            planned: nothing was launched yet.
        """
        found = [f"budget: {', '.join(shown(self.used, self.budget.limits, UNITS))} used"]
        if self.wanted is None:
            found.append("what the cells will take is not known yet: jobs hold their cells when the budget is used up")
        else:
            whole = self.going + self.wanted
            expected = " and ".join(f"{whole.of(name):.3g} {UNITS[name]}" for name in self.budget.limits)
            found.append(f"still expected: {expected} ({self.source})")
        if self.needed:
            cells = sum(len(pack.cells) for pack in self.beyond)
            raised = ", ".join(f"budget.{name} to {_rounded(value)}" for name, value in self.needed.items())
            held = f"{cells} cells {'would be' if planned else 'are'} beyond the budget and held. "
            held = held if cells else "the budget is used up. "
            found.append(f"{held}Raise {raised}, or run fewer cells, and launch again")
        return found

    def record(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "limits": self.budget.limits,
            "used": {name: self.used.of(name) for name in UNITS},
            "going": {name: self.going.of(name) for name in UNITS},
            "expected": None if self.wanted is None else {name: self.wanted.of(name) for name in UNITS},
            "source": self.source,
            "beyond": [cell for pack in self.beyond for cell in pack.cells],
            "needed": self.needed,
        }


def forecast(
    cells: Mapping[str, Mapping[str, Any]], packs: Sequence[Pack], runs: Path, price: Price, workers: int
) -> Forecast | None:
    """What these packs will take: as cells of their shapes took under `runs`, and otherwise their whole time limit;
    None where neither is known.

    A job that is requeued at its time limit takes more than one limit, and then its budget is checked anew.
    """
    measured = cell_seconds(cells, runs)
    if measured is not None:
        seconds, source = measured
        lengths = tuple(START_SECONDS + sum(seconds[cell] for cell in pack.cells) for pack in packs)
        return Forecast(price, lengths, f"measured in {source}", workers)
    if price.limit is None:
        return None
    return Forecast(price, (price.limit,) * len(packs), "at most: every job's time limit on Slurm", workers)


def judge(
    budget: Budget, packs: Sequence[Pack], expected: Forecast | None, spent: Usage, going: Usage | None = None
) -> Verdict:
    """Which of the packs, in order, fit into what the budget leaves.

    Args:
        expected: what they will take; None: not known, and all are kept unless the budget is used up already.
        spent: what the run has used.
        going: what cells that run, or are in a queue, will still take.
    """
    ahead = going or Usage()

    def fits(count: int) -> bool:
        whole = spent + ahead + (Usage() if expected is None else expected.usage(count))
        return all(whole.of(name) <= limit for name, limit in budget.limits.items())

    kept = len(packs)
    if expected is None:
        kept = kept if all(spent.of(name) < limit for name, limit in budget.limits.items()) else 0
    elif not fits(kept):
        low, high = -1, kept  # fits(low) holds, or nothing does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        kept = max(low, 0)
    wanted = None if expected is None else expected.usage()
    source = "" if expected is None else expected.source
    return Verdict(budget, tuple(packs[:kept]), tuple(packs[kept:]), spent, ahead, wanted, source)


def refuse_nothing_left(verdict: Verdict) -> None:
    """Raises UserError where the budget leaves room for none of the packs, and nothing else runs."""
    if verdict.kept or not verdict.beyond:
        return
    name, value = next(iter(verdict.needed.items()), (next(iter(verdict.budget.limits)), math.nan))
    limit, spent = verdict.budget.limits[name], verdict.used.of(name)
    going = f", and {verdict.going.of(name):.3g} are expected of what runs" if verdict.going.of(name) else ""
    raise UserError(
        f"leaves no room for any of the {sum(len(pack.cells) for pack in verdict.beyond)} cells: {spent:.3g} of "
        f"{limit:g} {UNITS[name]} are used{going}",
        key=f"budget.{name}",
        value=limit,
        hint=f"All of them need {_rounded(value)} in all{f' ({verdict.source})' if verdict.source else ''}: raise the "
        "budget, or run fewer cells.",
    )


def hold_beyond(run: Run, cells: Sequence[str], budget: Budget, queue: str = "") -> None:
    """Hold cells that are beyond the budget, until a launch finds room for them."""
    limits = " and ".join(f"{limit:g} {UNITS[name]}" for name, limit in budget.limits.items())
    event = {"event": "held", "by": WHO, "queue": queue, "why": f"beyond the budget of {limits}: raise it, and launch"}
    for identity in cells:
        run.cell(identity).append_attempt({**event, "at": time.time()})


def held_by_budget(run: Run, identity: str) -> bool:
    """Whether the newest event of a cell is a hold of the budget's."""
    if identity not in run.manifest["cells"]:
        return False
    event = run.cell(identity).last_attempt() or {}
    return event.get("event") == "held" and event.get("by") == WHO


def is_used_up(run: Run) -> Budget | None:
    """The run's budget, where its attempts have used it up; None where there is room, or no budget."""
    budget = run.budget
    if budget is None:
        return None
    spent = used(run)
    return budget if any(spent.of(name) >= limit for name, limit in budget.limits.items()) else None


def _rounded(value: float) -> str:
    """A number that is enough, in three digits."""
    if not math.isfinite(value) or value <= 0:
        return "more"
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / step) * step:g}"
