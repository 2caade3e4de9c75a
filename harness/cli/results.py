"""`klab results`: one document about several studies, made of their reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klab.harness.cli.arguments import RUNS, JsonOption, RunsOption, study_of
from klab.harness.cli.text import say, show_json


def results(
    runs_given: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run folders or archives, or names under --runs.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="The Markdown file; default: print it.")] = None,
    title: Annotated[str | None, typer.Option("--title", help="Its first heading.")] = None,
    preface: Annotated[
        Path | None,
        typer.Option("--preface", exists=True, dir_okay=False, help="Markdown of yours that stands before the rest."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Draw a few figures of each study into this folder, and show them.")
    ] = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Write one document about several studies: what fresh seeds established, claims, tables, costs, commands.

    Confirmations (`klab confirm`) stand with the studies that they confirm.
    """
    places = [_place(name, runs) for name in runs_given]
    from klab.harness.store import files
    from klab.reports.results_document import document
    from klab.reports.results_figures import draw_pictures, pictures_in
    from klab.reports.study_results import collect

    studies = collect(places)
    home = out.parent if out is not None else Path()
    if figures is not None:
        draw_pictures(studies, figures)
    pictures = pictures_in(figures, home) if figures is not None else None
    text = document(studies, title, pictures, preface.read_text(encoding="utf-8") if preface is not None else "")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.replace(out, text.encode())
    if as_json:
        show_json({"studies": [each.name for each in studies], "out": None if out is None else str(out), "text": text})
    elif out is None:
        say(text.rstrip("\n"))
    else:
        say(f"{out}: {len(studies)} studies")


def _place(name: str, runs: Path) -> str:
    """The folder of a run or an archive, as it was named."""
    opened = study_of(name, runs)
    return name if Path(name).resolve() == opened.path else str(runs / name)
