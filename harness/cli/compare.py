"""`klab compare`: two cells side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from klab.grid import UserError
from klab.harness.cli.arguments import RUNS, DeltaOption, JsonOption, RunsOption, study_of
from klab.harness.cli.table import show
from klab.harness.cli.text import say, show_json

ScoreOption = Annotated[
    str | None, typer.Option("--score", "--metric", help="What to compare by: reward, accuracy, reward_at_kl(0.5), ….")
]
CellArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN:CELL",
        help="A run or an archive, a colon, and a cell's id, any part of it, or its name in the report.",
    ),
]


def compare(
    first: CellArgument,
    second: CellArgument,
    score: ScoreOption = None,
    delta: DeltaOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Compare two cells over their seeds: settings that differ, results, seeds in pairs, curves."""
    (run, left), (other, right) = _split(first, runs), _split(second, runs)
    from klab.reports.compare_cells import compare_pair, configuration
    from klab.reports.sparkline import sparkline
    from klab.reports.study import load_runs
    from klab.reports.words import difference_span, p_words

    together = load_runs([run, other])
    groups = [
        configuration(load_runs([path]) if run != other else together, name)
        for path, name in ((run, left), (other, right))
    ]
    if groups[0] == groups[1]:
        raise UserError("both are seeds of the same configuration; name two configurations", key="cell", value=second)
    pair = compare_pair(together, groups[0], groups[1], score, delta)
    if as_json:
        show_json(pair.as_dict())
        return
    a, b = pair.labels
    show(("setting", a, b), pair.settings)
    say()
    rows = [(name, x, y) for name, x, y in pair.rows if math.isfinite(x) or math.isfinite(y)]
    show(("result, mean over seeds", a, b), rows)
    say()
    show(
        ("seed", a, b, "difference", "states"),
        [(seed, x, y, y - x, f"{p or '–'} / {q or '–'}") for seed, x, y, p, q in pair.seeds],
    )
    say()
    for title, x_curve, y_curve in pair.curves:
        known = [value for value in x_curve + y_curve if math.isfinite(value)]
        if known:
            low, high = min(known), max(known)
            show(
                (f"{title}, {low:.3g} to {high:.3g}", ""),
                [(a, sparkline(x_curve, 40, low, high)), (b, sparkline(y_curve, 40, low, high))],
            )
    found = pair.contrast
    if found.pairs == 0:
        say("No seed has ended in both cells: nothing can be said yet.")
        return
    words = difference_span(found.difference, found.low, found.high)
    if math.isfinite(found.p):
        words += f", {p_words(found.p)} (adjusted for all cells of the study): {found.verdict}"
    else:
        words += f" over {found.pairs} seed{'s' * (found.pairs > 1)}: nothing can be inferred"
    say(f"{pair.comparison.score.title}, {b} against {a}: {words}")
    for note in pair.comparison.notes:
        say(f"note: {note}")


def _split(text: str, runs: Path) -> tuple[Path, str]:
    name, colon, cell = text.rpartition(":")
    if not colon or not name or not cell:
        raise UserError(
            "is not RUN:CELL", value=text, hint="For example runs/quickstart:k1-loss or quickstart:baseline."
        )
    return study_of(name, runs).path, cell
