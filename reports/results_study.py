"""What the document about several studies says of one of them. Every number is one that its report has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from klab.reports import over_optimisation
from klab.reports.claim_tables import FAMILY_WORDS, claim_notes
from klab.reports.claims import ClaimRow, Judged
from klab.reports.comparison import Comparison
from klab.reports.confirmation import confirmed_rows
from klab.reports.findings import axis_findings, find
from klab.reports.fraction_words import prediction_words, resolution_words
from klab.reports.frame import records
from klab.reports.inference import DIFFERS
from klab.reports.markdown import bullets, code, paragraph, plain, table
from klab.reports.results_commands import commands
from klab.reports.scores import score_notes
from klab.reports.study_results import StudyResults
from klab.reports.theory import predictors, theory_words
from klab.reports.tuned import TunedPart, tuned_parts
from klab.reports.words import difference_span, mean_span, number, p_number, verdict_words

MOST_ROWS = 16
"""Cells of a task that the document shows."""
_MOST_PAIRS = 8


@dataclass(frozen=True)
class Picture:
    """A figure that the document shows: its file, relative to the document, and what is in it."""

    file: str
    title: str


def study_section(results: StudyResults, pictures: Sequence[Picture] = ()) -> list[str]:
    """Everything about one study, under a heading of the second level."""
    study = results.study
    lines = [f"## {plain(results.name)}", "", *paragraph(str(results.run.manifest.get("description", "")))]
    lines += code(commands(results))
    lines += _claims(results)
    lines += _confirmed(results)
    for comparison in results.comparisons:
        if len(results.comparisons) > 1:
            lines += [f"### {plain(comparison.task)}", ""]
        lines += _task(results, comparison)
    for over in results.across:
        rows = records(over.table.head(MOST_ROWS))
        lines += [
            f"### All {len(over.tasks)} tasks together",
            "",
            *paragraph(f"Mean differences of the {over.score.title}:"),
        ]
        lines += table(
            ("cell", "difference", "p", "verdict"),
            [
                (
                    row["label"],
                    difference_span(row["difference"], row["low"], row["high"]),
                    p_number(row["p"]),
                    row["verdict"],
                )
                for row in rows
            ],
        )
    for part in tuned_parts(study, results.comparisons):
        lines += ["### Tuned settings", "", *_tuned(results, part)]
    lines += [line for each in pictures for line in (f"![{plain(each.title)}]({each.file})", "")]
    lines += bullets(plain(note) for note in (*study.notes, *claim_notes(study)))
    return lines


def _claims(results: StudyResults) -> list[str]:
    """The claims with their verdicts, and beside them those on fresh seeds."""
    if not results.claims:
        return []
    again_of = [claim for each in results.confirmations for claim in each.claims]
    fresh = {claim.claim: claim for claim in again_of}
    several = len(results.study.tasks) > 1
    rows = []
    for claim in results.claims:
        again = {row.task: row for row in fresh[claim.claim].rows} if claim.claim in fresh else {}
        for place, row in enumerate(claim.rows):
            repeated = again.get(row.task)
            found = [_effect(row), _said(row)]
            if fresh:
                found += ["–", "–"] if repeated is None else [_effect(repeated), _said(repeated)]
            task = [row.task] if several else []
            rows.append((_stated(claim) if place == 0 else "", claim.score.title, *task, *found))
    heads = ["claim", "score", *(["task"] if several else []), "difference", "verdict"]
    heads += ["difference on fresh seeds", "verdict on fresh seeds"] if fresh else []
    return [*table(heads, rows), *paragraph(FAMILY_WORDS)]


def _stated(claim: Judged) -> str:
    source = f" ({claim.source})" if claim.source else ""
    late = f" Stated after {claim.late} runs had results." if claim.late else ""
    whole = f"; {claim.words}" if len(claim.rows) > 1 else ""
    return f"{claim.claim}{source}: expected {claim.expect}{whole}.{late}"


def _effect(row: ClaimRow) -> str:
    return difference_span(row.estimate, row.low, row.high)


def _said(row: ClaimRow) -> str:
    return f"{row.verdict}: {row.finding} (n = {row.n})"


def _confirmed(results: StudyResults) -> list[str]:
    """The cells that were run again on fresh seeds, beside what the exploration said of them."""
    lines = []
    parts = [(each, part) for each in results.confirmations for part in confirmed_rows(each.study, each.comparisons)]
    for again, part in parts:
        lines += paragraph(
            f"Confirmation: {len(part['rows'])} of {part['of']} configurations ran again on fresh seeds "
            f"({again.name}); only these seeds are judged."
        )
        lines += table(
            ("cell", "explored", "on fresh seeds", "difference to the baseline", "verdict"),
            [(row.label, row.explored, row.mean, row.difference, row.verdict) for row in part["rows"]],
        )
    return lines


def _task(results: StudyResults, comparison: Comparison) -> list[str]:
    study = results.study
    found = find(study, comparison)
    lines = paragraph(found.headline, found.lost_words)
    lines += _cells(results, comparison)
    lines += paragraph(_seen(results, comparison))
    if comparison.analysis.fit is not None:
        fit, titles = comparison.analysis.fit, {axis.key: axis.title for axis in study.axes}
        axes = [titles.get(key, key) for key in fit.axes]
        lines += paragraph(resolution_words(fit.resolution, axes, study.candidates), prediction_words(fit))
    axes_found = axis_findings(study, comparison)
    if len(axes_found) > 1:
        lines += bullets(f"{plain(each.title)}: {plain(each.words)}" for each in axes_found)
    lines += _interactions(results, comparison)
    lines += _proxy(results, comparison)
    lines += _theory(results, comparison)
    of_scores = (note for score in results.further_scores for note in score_notes(study, score))
    lines += bullets(plain(note) for note in dict.fromkeys((*comparison.notes, *of_scores)))
    return lines


def _cells(results: StudyResults, comparison: Comparison) -> list[str]:
    """The main table: the best cells and the baseline."""
    every = records(comparison.table)
    shown = every[:MOST_ROWS]
    if len(every) > MOST_ROWS and comparison.baseline not in [row["group"] for row in shown]:
        shown = [*shown[:-1], *(row for row in every if row["group"] == comparison.baseline)]
    further = results.further(comparison.task)
    beside = [{row["group"]: row for row in records(each.table)} for each in further]
    rows = [
        (
            f"{row['label']}{_is_baseline(comparison, row)}",
            mean_span(row["mean"], row["low"], row["high"]),
            difference_span(row["difference"], row["difference_low"], row["difference_high"]),
            (verdict_words(row) if comparison.baseline is not None else "") or "–",
            *(_beside(each[row["group"]]) for each in beside),
            number(row["reverse_kl_final"]),
            f"{row['n']}/{row['seeds']}",
        )
        for row in shown
    ]
    heads = ["cell", comparison.score.title, "difference", "verdict"]
    heads += [each.score.title for each in further]
    lines = table([*heads, "KL", "n"], rows, numbers=len(further) + 2)
    if (rest := len(every) - len(shown)) > 0:
        lines += [f"And {rest} more: `klab report {results.place}`.", ""]
    return lines


def _is_baseline(comparison: Comparison, row: dict[str, Any]) -> str:
    if row["group"] != comparison.baseline:
        return ""
    words = comparison.baseline_words
    return f" ({words})" if words and words != row["label"] else ""


def _beside(row: dict[str, Any]) -> str:
    """A further score of a cell: its mean, and its difference where there is one."""
    mean = mean_span(row["mean"], row["low"], row["high"])
    if not np.isfinite(row["difference"]):
        return mean
    return f"{mean}; {difference_span(row['difference'], row['difference_low'], row['difference_high'])}"


def _seen(results: StudyResults, comparison: Comparison) -> str:
    """How small a difference this study would have found."""
    least = results.detectable(comparison)
    if least is None:
        return ""
    seeds = int(comparison.table["n"].median())
    return (
        f"With {seeds} seeds and the spread of these runs a difference of {number(least)} to the baseline is found "
        "with probability 0.8; smaller ones may be there unseen."
    )


def _interactions(results: StudyResults, comparison: Comparison) -> list[str]:
    table_of = comparison.analysis.interactions
    if table_of.empty:
        return []
    titles = {axis.key: axis.title for axis in results.study.axes}
    every = sorted(records(table_of), key=lambda row: (row["verdict"] != DIFFERS, np.nan_to_num(row["p"], nan=2.0)))
    shown = every[:_MOST_PAIRS]
    rows = [
        (
            f"{titles.get(row['axis'], row['axis'])} × {titles.get(row['other'], row['other'])}",
            f"{row['value']} with {row['other_value']}",
            difference_span(row["difference"], row["low"], row["high"]),
            p_number(row["p"]),
            row["verdict"],
        )
        for row in shown
    ]
    acting = sum(row["verdict"] == DIFFERS for row in every)
    lines = paragraph(f"Pairs of axes that act together: {acting} of {len(every)} differ from what each does alone.")
    return lines + table(("axes", "clearest pair of values", "beyond both alone", "p", "verdict"), rows)


def _proxy(results: StudyResults, comparison: Comparison) -> list[str]:
    """What the gold reward did while training maximised another; nothing where no gold was recorded."""
    frame = over_optimisation.table(results.study, comparison)
    rows = [over_optimisation.texts(row) for row in records(frame.head(MOST_ROWS))]
    if not rows:
        return []
    lines = paragraph(f"Over-optimisation. {over_optimisation.sentence(frame, comparison.baseline)}")
    return [*lines, *table(over_optimisation.heads(frame), rows), *paragraph(over_optimisation.CAPTION)]


def _theory(results: StudyResults, comparison: Comparison) -> list[str]:
    found = predictors(comparison, results.gradients)
    rows = [
        (
            each.title,
            f"{number(each.correlation, 2)} [{number(each.low, 2)}, {number(each.high, 2)}]",
            str(each.cells),
        )
        for each in found
    ]
    heads = ("number of the exact lab", "rank correlation with the score", "cells")
    return [*paragraph(theory_words(found)), *table(heads, rows, numbers=1)]


def _tuned(results: StudyResults, part: TunedPart) -> list[str]:
    """What every configuration chose on each task, and which verdicts that changed."""
    seeds = f"{len(part.seeds)} tuning seed{'s' * (len(part.seeds) > 1)}"
    lines = paragraph(
        f"Every configuration chose {' and '.join(part.keys)} by the {part.score} on {seeds}; "
        f"{f'{part.distinct} different choices' if part.distinct > 1 else 'all chose the same'}."
    )
    place = results.study.names.index(part.name)
    task_of = dict(zip(results.study.cells["group"], results.study.cells["task"], strict=True))
    chosen: dict[str, dict[str, str]] = {}
    for arm, group in zip(part.arms, results.study.arms[place].groups.values(), strict=True):
        if len(arm.settings) > 1 and group in task_of:
            chosen.setdefault(arm.label, {})[task_of[group]] = arm.choice
    tasks = results.study.tasks
    rows = [(label, *(found.get(task, "–") for task in tasks)) for label, found in chosen.items()]
    lines += table(("cell", *(tasks if len(tasks) > 1 else ("chosen",))), rows[:MOST_ROWS])
    if len(rows) > MOST_ROWS:
        lines += paragraph(f"And {len(rows) - MOST_ROWS} more.")
    changed = list(_changes(part))
    if part.untuned:
        lines += paragraph("" if changed else "Without tuning all verdicts would be the same.")
        heads = ("task", "cell", "tuned", "verdict", "as written", "verdict as written")
        lines += table(heads, changed[:MOST_ROWS])
    return lines


def _changes(part: TunedPart) -> Iterator[tuple[str, str, str, str, str, str]]:
    for task, changes in part.changes.items():
        for each in changes:
            if each.changed:
                yield task, each.label, each.tuned, each.verdict, each.untuned, each.untuned_verdict
