"""`klab report`: tables, figures and one page about a run or several."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klab.grid import UserError
from klab.grid.score import parse_scores
from klab.harness.cli.arguments import RUNS, DeltaOption, JsonOption, RunsOption, grid_of, study_of
from klab.harness.cli.gradients import measure_run
from klab.harness.cli.table import console, show
from klab.harness.cli.text import say, show_json
from klab.harness.store.archive import Archive

if TYPE_CHECKING:
    from klab.reports.across import Across
    from klab.reports.comparison import Comparison

FORMATS = ("md", "latex", "csv", "json")
MEASURED = 100
"""Most configurations whose gradients the report measures unasked: some twenty seconds, once per run."""

_LINES = 20


def report(
    runs_given: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run folders or archives, or names under --runs.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the page, figures and tables; default: RUN/report.")
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            "--score",
            "--metric",
            help="What to compare by: reward (default, unless the grid file states one), accuracy, pass_at_k, "
            "training_reward, reward_at_kl(0.5), objective(0.05), parts.NAME, …; repeat it for several.",
        ),
    ] = None,
    delta: DeltaOption = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Cell to compare with; default: the grid file's baseline.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="Print the table as md, latex, csv or json, and write nothing.")
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Also write each figure as PDF, SVG and PNG.")
    ] = True,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", help="Draw curves over updates (default), tokens or samples; may be repeated."),
    ] = None,
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
        list[str] | None, typer.Option("--track", help="Also send the curves to tensorboard, wandb, mlflow or trackio.")
    ] = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Write tables, figures and one page about one run or several; failed and missing cells are listed."""
    if form is not None and form not in FORMATS:
        raise UserError("unknown format", key="--format", value=form, allowed=FORMATS)
    scores = parse_scores(score, "--score") if score else None
    opened = [study_of(name, runs) for name in runs_given]
    if track and (kept := [run.path for run in opened if isinstance(run, Archive)]):
        raise UserError("an archive does not keep what trackers get", key="--track", file=kept[0])
    from klab.reports.across import across_all
    from klab.reports.claim_tables import claim_notes, claim_records
    from klab.reports.claims import judged
    from klab.reports.comparison import compare_all
    from klab.reports.study import load_runs
    from klab.reports.tables import formatted

    paths = [run.path for run in opened]
    only = None if grid is None else {cell.id for cell in grid_of(grid).cells}
    if form is not None:
        study = load_runs(paths, baseline=baseline, only=only)
        across = across_all(study, scores, delta)
        claims = claim_records(judged(study, delta)) if form == "json" else ()
        say(formatted(compare_all(study, scores, delta), form, across, claims).rstrip("\n"))
        return
    from klab.reports.figures.effort import parse_units
    from klab.reports.page import write_report

    units = parse_units(over or (), "--over")

    with console().status("report") as status:
        if gradients:
            status.update("report: measuring gradients")
            for run in opened:
                with suppress(OSError):
                    measure_run(run, MEASURED, own_code=measure)
        status.update("report: reading")
        study = load_runs(paths, baseline=baseline, only=only)
        status.update("report: comparing")
        comparisons = compare_all(study, scores, delta)
        across = across_all(study, scores, delta)
        answers = judged(study, delta)
        page = write_report(
            study,
            comparisons,
            across,
            out,
            answers,
            figures=figures,
            over=units,
            progress=lambda text: status.update(f"report: {text}"),
        )
    for name in track or ():
        from klab.reports.track import follow

        for run in opened:
            follow(run, name)
    if as_json:
        show_json({"page": str(page)})
        return
    for comparison in comparisons:
        _show(comparison)
    for over_tasks in across:
        _show_across(over_tasks)
    for answer in answers:
        say(f"claim: {answer.claim}: {answer.words}")
    for note in (*claim_notes(study), *study.notes):
        say(f"note: {note}")
    say(str(page))


def _show(comparison: Comparison) -> None:
    from klab.reports.findings import noise_words
    from klab.reports.frame import records
    from klab.reports.words import mean_span, number, p_number, verdict_words

    rows = [
        (
            record["label"],
            mean_span(record["mean"], record["low"], record["high"]),
            _against(comparison, record),
            p_number(record["p"]),
            verdict_words(record),
            number(record["reverse_kl_final"]),
            f"{record['finished']}/{record['seeds']}",
        )
        for record in records(comparison.table.head(_LINES))
    ]
    title = comparison.score.title
    show(("cell", title, "against the baseline", "p", "verdict", "KL", "finished"), rows, title=comparison.task)
    if (rest := len(comparison.table) - _LINES) > 0:
        say(f"… and {rest} more cells; the page has them all.")
    say(comparison.analysis.headline)
    for note in (*comparison.notes, noise_words(comparison)):
        if note:
            say(f"note: {note}")


def _against(comparison: Comparison, record: dict[str, Any]) -> str:
    from klab.reports.words import difference_span

    if record["group"] == comparison.baseline and comparison.baseline_words:
        return f"({comparison.baseline_words})"
    return difference_span(record["difference"], record["difference_low"], record["difference_high"])


def _show_across(across: Across) -> None:
    from klab.reports.frame import records
    from klab.reports.words import difference_span, p_number

    rows = [
        (row["label"], difference_span(row["difference"], row["low"], row["high"]), p_number(row["p"]), row["verdict"])
        for row in records(across.table.head(_LINES))
    ]
    title = f"all {len(across.tasks)} tasks, {across.score.title}"
    show(("cell", "against the baseline", "p", "verdict"), rows, title=title)
