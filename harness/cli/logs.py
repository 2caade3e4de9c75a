"""`klab logs`: attempts, error and job output of one cell."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape

from klab.harness.cli.arguments import RUNS, JsonOption, RunArgument, RunsOption, run_of
from klab.harness.cli.table import console, show
from klab.harness.cli.text import show_json
from klab.harness.store import CellFolder
from klab.harness.store.job_output import job_output


def logs(
    run: RunArgument,
    cell: Annotated[str, typer.Argument(metavar="CELL", help="A cell's id, or any part that no other has.")],
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines of the job's output.")] = 40,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Show a cell's attempts, its error, and the end of its newest job's output."""
    opened = run_of(run, runs)
    folder = opened.cell(cell)
    events = folder.attempts()
    error = folder.error()
    outputs = job_output(opened, events, lines)
    if as_json:
        show_json({"cell": folder.id, "attempts": events, "error": error, "output": outputs})
        return
    screen = console()
    if not events:
        screen.print(f"{folder.id} was not started yet")
        return
    show(("when", "event", "details"), [(_when(event["at"]), event["event"], _details(event)) for event in events])
    _print_error(folder, error)
    for path, text in outputs.items():
        screen.print(f"\n[bold]{escape(str(opened.path / path))}[/]", soft_wrap=True)
        screen.print(text, markup=False, soft_wrap=True)


def _print_error(folder: CellFolder, error: str | None) -> None:
    if error is not None:
        screen = console()
        screen.print(f"\n[red]error of {folder.id}[/]", soft_wrap=True)
        screen.print(error, markup=False, soft_wrap=True)


def _when(at: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return str(at)


def _details(event: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value}"
        for key, value in event.items()
        if key not in ("event", "at", "log") and value not in ("", None)
    )
