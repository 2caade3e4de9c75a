"""How a study was conducted: what was stated before there were results, what was changed later, and how often it was
looked at. All verdicts of a report are reached under it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from klab.grid.schema.sections import AnalysisPlan, Stop
from klab.grid.score import parse_score
from klab.grid.yaml_document import dump_yaml
from klab.harness.store import Run
from klab.harness.store.confirmation import confirmations_of, confirms
from klab.harness.store.looks import looks, most_seeds
from klab.harness.store.stated_analysis import Version, versions
from klab.reports.inference.error_rate import look_share
from klab.reports.stages import Arms


@dataclass(frozen=True)
class Conduct:
    """How a study was conducted.

    Attributes:
        versions: by name of the run, every version of the stated analysis.
        score, delta: as stated last; None where nothing was stated.
        stated: groups whose comparison with the baseline was stated before the run had a result.
        share: the part of the error rate that the newest look may use; 1 where there was one look only.
        notes: what a reader should know of it.
    """

    versions: tuple[tuple[str, tuple[Version, ...]], ...]
    score: str | None
    delta: float | None
    stated: frozenset[str]
    share: float
    notes: tuple[str, ...]

    @property
    def was_stated(self) -> bool:
        """Whether some analysis was stated, at any time."""
        return any(each.plan is not None for _, found in self.versions for each in found)


@dataclass(frozen=True)
class Item:
    """One decision of the analysis: what was stated before there were results, what the report does, and whether these
    agree (None: nothing was stated)."""

    what: str
    stated: str
    used: str
    kept: bool | None

    @property
    def verdict(self) -> str:
        return {None: "chosen after looking", True: "as stated", False: "changed after looking"}[self.kept]


def conduct(runs: Sequence[Run], names: Sequence[str], arms: Sequence[Arms]) -> Conduct:
    """How these runs, reported together, were conducted.

    Args:
        arms: of each run, the groups that its configurations have in the report.

    Raises:
        UserError: the manifest of one of them is damaged.
    """
    found = tuple(
        (name, versions(run.manifest, run.path / "manifest.json")) for run, name in zip(runs, names, strict=True)
    )
    newest = [each[-1].plan for _, each in found if each[-1].plan is not None]
    shares, notes = [], []
    for run, (name, history) in zip(runs, found, strict=True):
        share, note = _looks(run, name, history)
        shares.append(share)
        notes += note
        late = [each for each in history[1:] if not each.beforehand]
        if late:
            notes.append(
                f"The stated analysis of {name} was changed after {late[-1].results} of its runs had results; both "
                "versions stand under “Stated beforehand”."
            )
    notes += _confirmations(runs, names)
    return Conduct(
        versions=found,
        score=next((plan.scores[0] for plan in newest if plan.scores), None),
        delta=next((plan.delta for plan in newest if plan.delta is not None), None),
        stated=frozenset(
            group
            for (_, history), each in zip(found, arms, strict=True)
            for arm in beforehand(history).cells
            if (group := each.group(arm)) is not None
        ),
        share=min(shares),
        notes=tuple(notes),
    )


def _confirmations(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """What to know where runs confirm others, or were confirmed."""
    found = []
    together = {run.name for run in runs}
    for run, name in zip(runs, names, strict=True):
        record = confirms(run)
        if record is not None and record["run"] in together:
            found.append(
                f"{name} confirms {record['run']}, which is reported with it: taken together they are no confirmation. "
                "Report it alone."
            )
        elif record is not None:
            what = "the cells of claims" if "claims" in record else "the best cells"
            found.append(
                f"{name} has {what} of {record['run']} on fresh seeds: nothing of the exploration enters, and "
                "its few comparisons have the error rate to themselves."
            )
        found += [
            f"{'Cells of claims' if apart.name.endswith('-claims') else 'The best cells'} of {name} were run again on "
            f"fresh seeds, which are reported apart: {apart.name}."
            for apart in ([] if record else confirmations_of(run))
            if apart.name not in together
        ]
    return found


def beforehand(history: Sequence[Version]) -> Version:
    """The last version before there were results; the first, which then states nothing that counts, where none is."""
    known = [each for each in history if each.beforehand]
    return known[-1] if known else Version(None, "", None, 0, ())


def stop_of(history: Sequence[Version]) -> Stop | None:
    """When seeds are no longer added: as stated before there were results, else as stated last."""
    stops = [each.plan.stop for each in (beforehand(history), history[-1]) if each.plan and each.plan.stop]
    return stops[0] if stops else None


def spending_of(history: Sequence[Version]) -> str:
    """How the error rate is spent over the looks."""
    stop = stop_of(history)
    return stop.spending if stop is not None else "obrien_fleming"


def items(history: Sequence[Version], score: str, delta: float, contrasts: int) -> list[Item]:
    """What was stated beside what the report does.

    Args:
        history: the versions of one run.
        score, delta: those of the report.
        contrasts: how many cells the report compares with the baseline.
    """
    plan = beforehand(history).plan or AnalysisPlan()
    count = len(beforehand(history).cells)
    newest = history[-1].plan or AnalysisPlan()
    stop, now = (_stop(each) for each in (plan, newest))
    names = [parse_score(name).name for name in plan.scores]
    margin = "" if plan.delta is None else f"±{plan.delta:g}"
    return [
        _item("score", ", ".join(names), score, names[:1] == [score]),
        _item("margin of equivalence", margin, f"±{delta:g}", plan.delta == delta),
        _item(
            "contrasts",
            f"{count} cells with the baseline" if count else "",
            f"{contrasts} cells with the baseline" + (f", {contrasts - count} of them after looking" if count else ""),
            True,
        ),
        _item("seeds", stop, now or "no limit", stop == now),
    ]


def history_rows(history: Sequence[Version]) -> list[dict[str, Any]]:
    """Every version with its time, its digest, how many results there were, and its text."""
    return [
        {
            "at": "before this record was kept" if each.at is None else _date(each.at),
            "results": each.results,
            "digest": each.digest[:16],
            "text": "nothing" if each.plan is None else dump_yaml(each.plan.model_dump(mode="json", exclude_none=True)),
        }
        for each in history
    ]


def methods_words(found: Conduct) -> str:
    """A sentence for the methods paragraph."""
    if not found.was_stated:
        return "No analysis was stated before the study ran: score, margin and contrasts are defaults or later choices."
    digests = ", ".join(dict.fromkeys(beforehand(history).digest[:16] for _, history in found.versions))
    if not any(beforehand(history).plan for _, history in found.versions):
        return "An analysis was stated, but only after runs had results: it counts as chosen after looking."
    return (
        f"The analysis was stated before the first run had a result and recorded with its digest ({digests}); what "
        "departs from it is marked."
    )


def _looks(run: Run, name: str, history: Sequence[Version]) -> tuple[float, list[str]]:
    """The share of the error rate at the newest look, and what to say of the looks."""
    taken, stop = looks(run.manifest), stop_of(history)
    stated = stop.seeds if stop is not None else None
    most = max(stated or 0, most_seeds(run.manifest) or 0, taken[-1])
    spending = spending_of(history)
    if most == taken[0]:
        return 1.0, []
    share = look_share(taken, most, spending)
    shown = " and ".join(map(str, taken))
    notes = [
        f"{name} is looked at with {shown} of at most {most} seeds per cell: verdicts of this look use {share:.2g} of "
        "the error rate of 0.05, so that all looks together keep it."
    ]
    if stated is None or most > stated:
        notes.append(
            f"How many seeds {name} would have at most was not stated beforehand: the error rate holds for what this "
            "report says, not for what was said before seeds were added."
        )
    return share, notes


def _item(what: str, stated: str, used: str, same: bool) -> Item:
    return Item(what, stated or "–", used, same if stated else None)


def _stop(plan: AnalysisPlan) -> str:
    return "" if plan.stop is None else f"at most {plan.stop.seeds}, error spent as {plan.stop.spending}"


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))
