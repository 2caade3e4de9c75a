"""`klab report`: what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.places import RUNS, JsonOption, RunsOption, run_of
from harness.cli.table import show_json


def report(
    runs_given: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or names under --runs.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the page and tables; default: RUN/report.")
    ] = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Write tables, figures and one page about one run or several; failed and missing cells are listed."""
    opened = [run_of(name, runs) for name in runs_given]
    from reports import render

    page = render([run.path for run in opened], out or opened[0].report)
    if as_json:
        show_json({"page": str(page)})
    else:
        typer.echo(str(page))
