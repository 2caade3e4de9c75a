"""What a document about several studies is made of: every study with its comparisons, claims, and confirmation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from klab.grid import UserError
from klab.grid.score import Score, parse_score
from klab.harness.store import Run
from klab.harness.store.archive import Archive
from klab.harness.store.confirmation import confirms
from klab.harness.store.usage import Usage, span, used
from klab.reports.across import Across, across_all
from klab.reports.claims import Judged, judged
from klab.reports.comparison import Comparison, compare, compare_all
from klab.reports.gradients import load_gradients
from klab.reports.inference import ALPHA
from klab.reports.inference.power import PlannedDesign, detectable_contrast
from klab.reports.pilot import noise_of
from klab.reports.study import Study, load_run

_AT_KL = "reward_at_kl"


@dataclass(frozen=True)
class StudyResults:
    """One run or archive, as its report has it.

    Attributes:
        place: the folder, as it was given.
        confirmations: the runs among the inputs that have cells of this one on fresh seeds.
    """

    place: str
    study: Study
    confirmations: tuple[StudyResults, ...] = ()

    @property
    def run(self) -> Run:
        return self.study.runs[0]

    @property
    def name(self) -> str:
        return self.run.name

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """One per task, by the main score."""
        return compare_all(self.study)

    @cached_property
    def further_scores(self) -> tuple[Score, ...]:
        """What else cells are compared by: the other scores that the study states, and reward at matched KL where a
        claim is about it."""
        main = self.comparisons[0].score.name if self.comparisons else ""
        plan = self.study.conduct.versions[0][1][-1].plan
        names = [parse_score(name).name for name in (plan.scores if plan is not None else ())]
        names += [claim.score.name for claim in self.claims if claim.score.name.startswith(_AT_KL)]
        return tuple(parse_score(name) for name in dict.fromkeys(names) if name != main)

    def further(self, task: str) -> list[Comparison]:
        """The comparisons of a task by the further scores."""
        return [compare(self.study, task, score) for score in self.further_scores]

    @cached_property
    def across(self) -> list[Across]:
        return across_all(self.study)

    @cached_property
    def claims(self) -> tuple[Judged, ...]:
        return judged(self.study)

    @cached_property
    def gradients(self) -> pd.DataFrame | None:
        return load_gradients(self.study)

    @cached_property
    def usage(self) -> Usage:
        return self.run.usage if isinstance(self.run, Archive) else used(self.run)

    @cached_property
    def span(self) -> tuple[float, float] | None:
        """When the first attempt began and the last one ended, in seconds since 1970."""
        return self.run.span if isinstance(self.run, Archive) else span(self.run)

    def detectable(self, comparison: Comparison) -> float | None:
        """The difference to the baseline that is found with power 0.8 at the noise of these runs; None where that is
        not known."""
        groups = [len(each.groups) for each in self.comparisons if each.baseline is not None]
        seeds = int(comparison.table["n"].median()) if len(comparison.table) else 0
        if comparison.baseline is None or max(groups) < 2 or self.study.held_out is not None:
            return None
        axes = [axis for axis in self.study.axes if not axis.key.startswith("task") and axis.key != "policy"]
        crossed = [(axis.key, len(axis.values)) for axis in axes] if self.study.factorial else []
        design = PlannedDesign(
            tuple(groups),
            len(self.study.conduct.stated),
            tuple(crossed) if len(crossed) > 1 else (),
            ALPHA * self.study.conduct.share,
        )
        try:
            noise, _ = noise_of(self.study, comparison.score)
        except UserError:
            return None
        found = detectable_contrast(design, seeds, noise)
        return found if found > 0 else None


def collect(paths: Sequence[str | Path]) -> list[StudyResults]:
    """The studies in these folders, in the order given; confirmations stand with what they confirm.

    Raises:
        UserError: a folder is neither a run nor an archive, or no folder was given.
    """
    if not paths:
        raise UserError("nothing to report: name at least one run folder or archive")
    found = [StudyResults(str(path), load_run(path)) for path in paths]
    known = {each.name: place for place, each in reversed(list(enumerate(found)))}
    apart: dict[int, list[StudyResults]] = {place: [] for place in range(len(found))}
    for place, each in enumerate(found):
        record = confirms(each.run)
        at = None if record is None else known.get(str(record["run"]))
        if at is not None and confirms(found[at].run) is None:
            apart[at].append(each)
            del apart[place]
    return [replace(found[place], confirmations=tuple(again)) for place, again in apart.items()]
