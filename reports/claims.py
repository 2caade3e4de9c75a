"""The verdicts on a study's claims: which hold here, which are contradicted here, and which are open.

Every row is an estimate of one family with simultaneous 95% intervals: all claims of the study on all tasks, whatever
they are scored by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from klab.grid import Cell
from klab.grid.claims import StatedClaim
from klab.grid.score import DEFAULT_SCORE, Score, parse_score
from klab.harness.store import Run
from klab.harness.store.stated_claims import RecordedClaim, recorded_claims
from klab.reports.claim_estimates import Asked, Question
from klab.reports.claim_words import CONTRADICTED, HOLDS, finding, overall
from klab.reports.comparison import ComparedStudy
from klab.reports.inference import ALPHA, DELTA, DIFFERS, UNDECIDED
from klab.reports.inference.family import Family
from klab.reports.inference.power import MOST_SEEDS
from klab.reports.inference.stated_claims import claims_family
from klab.reports.stages import Arms
from klab.reports.words import MARK


class ClaimingStudy(ComparedStudy, Protocol):
    """What claims need of a study; see `klab.reports.study.Study` for the attributes."""

    @property
    def runs(self) -> tuple[Run, ...]: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def arms(self) -> tuple[Arms, ...]: ...
    @property
    def configurations(self) -> Mapping[str, Cell]: ...


@dataclass(frozen=True)
class ClaimRow:
    """A claim on one task.

    Attributes:
        estimate: mean score of the claim's cells minus that of those they are compared with, paired by seed; NaN where
            runs are missing.
        low, high: the simultaneous 95% interval; NaN where nothing can be inferred.
        p: adjusted for all claims and tasks; below 0.05 exactly where the interval excludes 0.
        n: the fewest seeds behind a pair of cells.
        compared, planned: how many matches of cells have runs, and how many there are.
        verdict: ``holds``, ``contradicted`` or ``undecided``.
        more_seeds: further seeds per cell that would decide at the present estimate; None where decided, or where no
            number up to `MOST_SEEDS` would.
        finding: what that rests on, in a clause.
        bound_low, bound_high: the ends of the difference, whatever stopped runs would have reached between the lowest
            and the highest score of the task; NaN where none counts.
        depends: whether the verdict is another one at either end.
    """

    task: str
    estimate: float
    low: float
    high: float
    p: float
    n: int
    compared: int
    planned: int
    verdict: str
    more_seeds: int | None
    finding: str
    bound_low: float
    bound_high: float
    depends: bool


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict.

    Attributes:
        claim, source: as stated.
        expect: ``higher``, ``lower`` or ``equal``.
        score: what it is judged by; `score.title` is its name in sentences.
        delta: smaller differences count as none; None: no difference does.
        compared: what is compared, in a clause.
        rows: one per task, in the order of the study.
        verdict: ``holds``, ``contradicted``, ``depends on the task`` or ``undecided``.
        words: the verdict for readers: ``holds here``, ``undecided (7 more seeds per cell)``.
        late: how many runs had results when it was stated; 0: it was stated beforehand.
        cells, against: the groups of both sides.
    """

    claim: str
    source: str
    expect: str
    score: Score
    delta: float | None
    compared: str
    rows: tuple[ClaimRow, ...]
    verdict: str
    words: str
    late: int
    cells: tuple[str, ...]
    against: tuple[str, ...]


def judged(study: ClaimingStudy, delta: float | None = None, share: float | None = None) -> tuple[Judged, ...]:
    """The verdicts on all claims of the study's runs, in the order in which they are stated.

    Claims whose cells are not in the study are absent (`left_out` names them).

    Args:
        delta: instead of the study's margin of equivalence.
        share: the part of the error rate that may be used; None: that of the study's newest look.
    """
    asked = [_Asked.read(study, record, delta) for record in _records(study).values()]
    asked = [each for each in asked if each.stated is not None]
    questions = [(each, task) for each in asked for task in each.tasks]
    if not questions:
        return ()
    found = Asked(study, [Question(each.score, task, each.tasks[task]) for each, task in questions])
    estimates, bounds = found.estimates(), found.bounds()
    deltas = np.asarray([each.delta or 0.0 for each, _ in questions])
    alpha = ALPHA * (study.conduct.share if share is None else share)
    family = claims_family(estimates, deltas, alpha)
    rows = []
    for place, (each, task) in enumerate(questions):
        moved = [[*estimates[:place], end, *estimates[place + 1 :]] for end in bounds.get(place, ())]
        ends = [claims_family(parts, deltas, alpha) for parts in moved]
        rows.append(_row(each, task, family, place, int(estimates[place].matches[0]), ends))
    return tuple(
        each.judged([row for row, (other, _) in zip(rows, questions, strict=True) if other is each]) for each in asked
    )


def stated_claims(study: ClaimingStudy) -> tuple[StatedClaim, ...]:
    """The claims of which this study has cells to compare, with its own groups."""
    found = (_present(study, each.stated) for each in _records(study).values())
    return tuple(each for each in found if each is not None)


def left_out(study: ClaimingStudy) -> tuple[str, ...]:
    """Claims of which this study has no cells to compare."""
    records = _records(study).values()
    return tuple(each.stated.claim.claim for each in records if _present(study, each.stated) is None)


@dataclass(frozen=True, eq=False)
class _Asked:
    """A claim as this report can judge it."""

    record: RecordedClaim
    stated: StatedClaim | None
    score: Score
    delta: float | None
    tasks: Mapping[str, list[list[tuple[str, str]]]]

    @classmethod
    def read(cls, study: ClaimingStudy, record: RecordedClaim, delta: float | None) -> _Asked:
        claim, main = record.stated.claim, parse_score(study.conduct.score or DEFAULT_SCORE)
        score = main if claim.score is None else parse_score(claim.score)
        margin = study.conduct.delta if delta is None else delta
        own = score.from_0_to_1 or (margin is not None and score.name == main.name)
        stated = _present(study, record.stated)
        task_of = dict(zip(study.cells["group"], study.cells["task"], strict=True))
        tasks: dict[str, list[list[tuple[str, str]]]] = {
            task: [] for task in study.tasks if stated and task in {task_of[group] for group in stated.cells}
        }
        for match in stated.matches if stated else ():
            tasks[task_of[match.cells[0]]].append(match.pairs)
        used = claim.delta if claim.delta is not None else (DELTA if margin is None else margin) if own else None
        return cls(record, stated, score, used, tasks)

    def judged(self, rows: Sequence[ClaimRow]) -> Judged:
        assert self.stated is not None
        claim = self.stated.claim
        verdict, words = overall(rows)
        return Judged(
            claim=claim.claim,
            source=claim.source,
            expect=claim.expect,
            score=self.score,
            delta=self.delta,
            compared=self.stated.compared,
            rows=tuple(rows),
            verdict=verdict,
            words=words,
            late=self.record.results,
            cells=self.stated.cells,
            against=self.stated.against,
        )


def _records(study: ClaimingStudy) -> dict[str, RecordedClaim]:
    """The claims of all runs by what they say, the groups those of the report; a claim of several runs compares the
    cells of all of them."""
    found: dict[str, RecordedClaim] = {}
    for run, arms in zip(study.runs, study.arms, strict=True):
        for record in recorded_claims(run.manifest, run.path / "manifest.json"):
            if record.withdrawn is not None:
                continue
            stated = record.stated
            names = {group: arms.group(group) for group in (*stated.cells, *stated.against)}
            stated = stated.renamed(names) or StatedClaim(stated.claim, ())
            key = stated.claim.model_dump_json()
            known = found.get(key)
            if known is not None:
                matches = tuple(dict.fromkeys((*known.stated.matches, *stated.matches)))
                stated = StatedClaim(stated.claim, matches)
            late = max(record.results, known.results if known else 0)
            found[key] = RecordedClaim(stated, late, None)
    return found


def _present(study: ClaimingStudy, stated: StatedClaim) -> StatedClaim | None:
    """The claim about the cells that are in the study; None where there is nothing to compare."""
    groups = (*stated.cells, *stated.against)
    return stated.renamed({group: group if group in study.configurations else None for group in groups})


def _verdict(asked: _Asked, family: Family, place: int) -> tuple[str, float | None]:
    """The verdict of a row, and the margin where the verdict is that its interval lies within it."""
    assert asked.stated is not None
    expect, differs = asked.stated.claim.expect, family.verdict[place] == DIFFERS
    inside = asked.delta is not None and bool(family.low[place] > -asked.delta and family.high[place] < asked.delta)
    if inside and (expect == "equal" or not differs):
        return HOLDS if expect == "equal" else CONTRADICTED, asked.delta
    if not differs:
        return UNDECIDED, None
    return HOLDS if expect == ("higher" if family.estimate[place] > 0 else "lower") else CONTRADICTED, None


def _row(asked: _Asked, task: str, family: Family, place: int, compared: int, ends: Sequence[Family]) -> ClaimRow:
    estimate, low, high = (float(values[place]) for values in (family.estimate, family.low, family.high))
    verdict, within = _verdict(asked, family, place)
    more = float(family.more[place])
    seeds = int(more) if np.isfinite(more) and more <= MOST_SEEDS else None
    planned = len(asked.tasks[task])
    words = finding(verdict, estimate, low, within, seeds)
    if compared < planned:
        words += f"; from {compared} of {planned} comparisons, the others have no runs"
    depends = any(_verdict(asked, each, place)[0] != verdict for each in ends)
    if depends:
        words += f"; depends on what stopped runs would have reached ({MARK})"
    bounds = [estimate, *(float(each.estimate[place]) for each in ends)]
    return ClaimRow(
        task,
        estimate,
        low,
        high,
        float(family.p[place]),
        int(family.n[place]),
        compared,
        planned,
        verdict,
        seeds if verdict == UNDECIDED else None,
        words,
        min(bounds) if ends else np.nan,
        max(bounds) if ends else np.nan,
        depends,
    )
