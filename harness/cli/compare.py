"""`klab compare`: two cells side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from klab.grid import UserError
from klab.harness.cli.arguments import RUNS, JsonOption, RunsOption, run_of
from klab.harness.cli.report import span
from klab.harness.cli.table import show
from klab.harness.cli.text import say, show_json

CellArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN:CELL", help="A run, a colon, and a cell's id, any part of it, or its name in the report."
    ),
]


def compare(
    first: CellArgument,
    second: CellArgument,
    metric: Annotated[str, typer.Option("--metric", help="The result to compare by.")] = "reward_final",
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Compare two cells over their seeds: settings that differ, results, seeds in pairs, curves."""
    (run, left), (other, right) = _split(first, runs), _split(second, runs)
    from klab.reports.compare_cells import compare_pair, configuration
    from klab.reports.sparkline import sparkline
    from klab.reports.study import load_runs

    together = load_runs([run, other])
    groups = [
        configuration(load_runs([path]) if run != other else together, name)
        for path, name in ((run, left), (other, right))
    ]
    if groups[0] == groups[1]:
        raise UserError("both are seeds of the same configuration; name two configurations", key="cell", value=second)
    pair = compare_pair(together, groups[0], groups[1], metric)
    if as_json:
        show_json(pair.as_dict())
        return
    a, b = pair.labels
    show(("setting", a, b), pair.settings)
    say()
    rows = [
        (name, span(*x[:3]), span(*y[:3]), span(*d[:3], sign=True))
        for name, x, y, d in pair.rows
        if math.isfinite(x.estimate) or math.isfinite(y.estimate)
    ]
    show(("result, mean over seeds", a, b, "difference, same seeds"), rows)
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
    c = pair.contrast
    if c.n == 0:
        say("No seed has ended in both cells: nothing can be said yet.")
        return
    p = f"p = {c.p:.3f} by sign flips over {c.n} pairs (cannot be below {2.0 ** (1 - c.n):.3g})"
    say(f"{b} against {a}: {span(c.estimate, c.low, c.high, sign=True)}, {p}, P(better) = {pair.improvement:.2f}")


def _split(text: str, runs: Path) -> tuple[Path, str]:
    name, colon, cell = text.rpartition(":")
    if not colon or not name or not cell:
        raise UserError(
            "is not RUN:CELL", value=text, hint="For example runs/quickstart:k1-loss or quickstart:baseline."
        )
    return run_of(name, runs).path, cell
