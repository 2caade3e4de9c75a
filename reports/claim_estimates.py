"""What the claims of a study ask of its runs: the difference of every claim on every task, and how far stopped runs
could move it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from klab.grid import UserError
from klab.grid.score import Score
from klab.reports.comparison import ComparedStudy, run_frame
from klab.reports.inference.design import read_design
from klab.reports.inference.stated_claims import Differences, differences
from klab.reports.scores import Array, run_scores


@dataclass(frozen=True)
class Question:
    """What a claim asks on one task: pairs of groups, match by match, compared by a score."""

    score: Score
    task: str
    matches: Sequence[Sequence[tuple[str, str]]]


class Asked:
    """The questions of one study, answered from one design per score and task."""

    def __init__(self, study: ComparedStudy, questions: Sequence[Question]) -> None:
        self.study, self.questions = study, questions

    @cached_property
    def _frames(self) -> Mapping[tuple[str, str], _Frame]:
        kinds = {(each.score.name, each.task): each for each in self.questions}
        return {kind: _Frame(self.study, each.score, each.task) for kind, each in kinds.items()}

    def estimates(self) -> list[Differences]:
        """The difference that each question asks for."""
        found: dict[int, Differences] = {}
        for kind, frame in self._frames.items():
            places = [place for place, each in enumerate(self.questions) if (each.score.name, each.task) == kind]
            part = frame.differences([self.questions[place].matches for place in places])
            found |= {place: part.only(index) for index, place in enumerate(places)}
        return [found[place] for place in range(len(self.questions))]

    def bounds(self) -> dict[int, tuple[Differences, Differences]]:
        """Of every question in which stopped runs count, its difference with those of its first side at the lowest and
        those of its second side at the highest score that a run of the task has, and the other way round.

        Whatever within that range the stopped runs would have reached, the difference lies between the two.
        """
        found = {}
        for place, each in enumerate(self.questions):
            frame = self._frames[each.score.name, each.task]
            sides = [{pair[side] for match in each.matches for pair in match} for side in (0, 1)]
            if (moved := frame.moved(*sides)) is not None:
                low, high = (frame.differences([each.matches], scores) for scores in moved)
                found[place] = low, high
        return found


class _Frame:
    """The runs of one task with one score."""

    def __init__(self, study: ComparedStudy, score: Score, task: str) -> None:
        mine = (study.cells["task"] == task).to_numpy()
        cells = study.cells[mine]
        values = _scores(study, score)[mine]
        self.frame, self.baseline = run_frame(study, cells, values, study.baselines.get(task))
        self.group = cells["group"].to_numpy()
        self.row = {group: index for index, group in enumerate(dict.fromkeys(self.group))}
        self.higher, self.crossed = score.higher, study.held_out is None

    def differences(
        self, questions: Sequence[Sequence[Sequence[tuple[str, str]]]], scores: Array | None = None
    ) -> Differences:
        frame = self.frame if scores is None else self.frame.assign(score=scores)
        pairs = [[[(self.row[one], self.row[other]) for one, other in match] for match in each] for each in questions]
        return differences(read_design(frame, self.baseline, self.higher), pairs, crossed=self.crossed)

    def moved(self, cells: set[Any], against: set[Any]) -> tuple[Array, Array] | None:
        """The scores with the stopped runs of two sides at opposite ends; None where neither has one."""
        state = self.frame["state"].to_numpy(dtype=object)
        score = pd.to_numeric(self.frame["score"], errors="coerce").to_numpy(dtype=np.float64)
        scored = np.isfinite(score) & np.isin(state, ("finished", "stopped"))
        stopped = scored & (state == "stopped")
        first, second = (stopped & np.isin(self.group, list(side)) for side in (cells, against))
        if not (first | second).any():
            return None
        low, high = float(score[scored].min()), float(score[scored].max())
        down = np.where(first, low, np.where(second, high, score))
        return down, np.where(first, high, np.where(second, low, score))


def _scores(study: ComparedStudy, score: Score) -> Array:
    """The score of every run; none where nothing has been evaluated by it yet."""
    try:
        return run_scores(study, score)
    except UserError:
        return np.full(len(study.cells), np.nan)
