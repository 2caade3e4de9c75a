"""Configurations that ran on several tasks, compared over all of them: differences averaged over the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from klab.grid.score import Score
from klab.reports.comparison import (
    RUN_COLUMNS,
    ComparedStudy,
    asked,
    axis_values,
    common_baseline,
    error_share,
    run_frame,
)
from klab.reports.inference import DIFFERS, analyse
from klab.reports.scores import run_scores


@dataclass(frozen=True)
class Across:
    """What one score shows over all tasks.

    `table` has one row per configuration but the baseline: ``label``, ``difference`` from the baseline, averaged over
    the tasks that have both, ``low``, ``high`` (simultaneous with the differences within tasks), ``p``, ``verdict``,
    ``pairs``, ``more_seeds``, ``better``.
    """

    score: Score
    tasks: tuple[str, ...]
    table: pd.DataFrame
    delta: float
    alpha: float


def across_all(study: ComparedStudy, scores: Sequence[Score] | None = None, delta: float | None = None) -> list[Across]:
    """The comparisons over all tasks, one by every score; empty where there is none."""
    return [found for score in scores or (None,) if (found := compare_across(study, score, delta)) is not None]


def compare_across(study: ComparedStudy, score: str | Score | None = None, delta: float | None = None) -> Across | None:
    """The comparison over all tasks; None for a single task, or where baselines differ between tasks.

    Score and margin that are not given are those that the study states.
    """
    score, delta = asked(study, score, delta)
    baseline = common_baseline(study)
    if baseline is None:
        return None
    frame, _ = run_frame(study, study.cells, run_scores(study, score), None)
    names = {group: frame.loc[row] for row, group in reversed(list(enumerate(study.cells["group"])))}
    keys = [key for key in frame.columns if key not in RUN_COLUMNS]
    reference = {key: names[study.baselines[study.tasks[0]]][key] for key in keys}
    frame = frame.assign(task=study.cells["task"].to_numpy())
    found = analyse(
        frame,
        reference,
        delta,
        higher=score.higher,
        share=error_share(study),
        held_out=None if study.held_out is None else axis_values(frame, study.cells, study.held_out),
    )
    labels = {tuple(row[key] for key in keys): study.labels[group] for group, row in names.items()}
    table = found.across
    if len(table):
        table = table.assign(label=[labels[tuple(row)] for row in table[keys].itertuples(index=False)])
        gain = table["difference"] if score.higher else -table["difference"]
        table = table.assign(better=(table["verdict"] == DIFFERS) & (gain > 0), gain=gain)
        table = table.sort_values("gain", ascending=False, kind="stable", na_position="last", ignore_index=True)
    columns = ["label", "difference", "low", "high", "p", "verdict", "pairs", "more_seeds", "better"]
    return Across(score, study.tasks, table.reindex(columns=columns), delta, found.alpha)
