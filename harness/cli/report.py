"""`klab report`: tables, figures and one page about a run or several."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.grid import UserError
from klab.harness.cli.arguments import RUNS, JsonOption, RunsOption, grid_of, run_of
from klab.harness.cli.gradients import measure_run
from klab.harness.cli.table import console, show
from klab.harness.cli.text import say, show_json

if TYPE_CHECKING:
    from klab.reports.comparison import Comparison

FORMATS = ("md", "latex", "csv", "json")
MEASURED = 100
"""Most configurations whose gradients the report measures unasked: some twenty seconds, once per run."""

_LINES = 20


def report(
    runs_given: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or names under --runs.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the page, figures and tables; default: RUN/report.")
    ] = None,
    metric: Annotated[
        str, typer.Option("--metric", help="The result to rank by, as reward_final, accuracy_final, reverse_kl_final.")
    ] = "reward_final",
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Cell to compare with; default: the grid file's baseline.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="Print the table as md, latex, csv or json, and write nothing.")
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Also write each figure as PDF, SVG and PNG.")
    ] = True,
    gradients: Annotated[
        bool, typer.Option("--gradients/--no-gradients", help="Measure each configuration's gradient in the exact lab.")
    ] = True,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure gradients also of cells with the user's own code, which is run.")
    ] = False,
    grid: Annotated[
        str | None, typer.Option("--grid", metavar="GRID", help="Report only the cells of this grid file.")
    ] = None,
    track: Annotated[
        list[str] | None, typer.Option("--track", help="Also send the curves to tensorboard or wandb; may be repeated.")
    ] = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Write tables, figures and one page about one run or several; failed and missing cells are listed."""
    if form is not None and form not in FORMATS:
        raise UserError("unknown format", key="--format", value=form, allowed=FORMATS)
    opened = [run_of(name, runs) for name in runs_given]
    from klab.reports.comparison import compare
    from klab.reports.study import load_runs
    from klab.reports.tables import formatted

    paths = [run.path for run in opened]
    only = None if grid is None else {cell.id for cell in grid_of(grid).cells}
    if form is not None:
        study = load_runs(paths, baseline=baseline, only=only)
        say(formatted([compare(study, task, metric) for task in study.tasks], form).rstrip("\n"))
        return
    from klab.reports.page import render

    with console().status("report") as status:
        if gradients:
            status.update("report: measuring gradients")
            for run in opened:
                with suppress(OSError):
                    measure_run(run, MEASURED, own_code=measure)
        page = render(
            paths,
            out,
            metric=metric,
            baseline=baseline,
            only=only,
            figures=figures,
            progress=lambda text: status.update(f"report: {text}"),
        )
    for name in track or ():
        from klab.reports.track import follow

        for run in opened:
            follow(run, name)
    if as_json:
        show_json({"page": str(page)})
        return
    study = load_runs(paths, baseline=baseline, only=only)
    for task in study.tasks:
        _show(compare(study, task, metric))
    for note in study.notes:
        say(f"note: {note}")
    say(str(page))


def _show(comparison: Comparison) -> None:
    from klab.reports.frame import records
    from klab.reports.schema import TITLES

    rows = []
    for record in records(comparison.table.head(_LINES)):
        rows.append(
            (
                record["label"],
                span(record["mean"], record["low"], record["high"]),
                span(record["difference"], record["difference_low"], record["difference_high"], sign=True),
                record["reverse_kl_final"] if math.isfinite(record["reverse_kl_final"]) else None,
                f"{record['finished']}/{record['seeds']}",
                "best" if record["best_group"] else "",
            )
        )
    show(("cell", TITLES[comparison.metric], "against the baseline", "KL", "finished", ""), rows, title=comparison.task)
    if (rest := len(comparison.table) - _LINES) > 0:
        say(f"… and {rest} more cells; the page has them all.")


def span(center: float, low: float, high: float, sign: bool = False) -> str:
    """A mean with its interval, as text."""
    if not math.isfinite(center):
        return ""
    form = "+.3f" if sign else ".3f"
    return f"{center:{form}}" + (f" [{low:{form}}, {high:{form}}]" if math.isfinite(low) else "")
