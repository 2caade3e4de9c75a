"""`klab logs`: attempts, error and job output of one cell."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from klab.harness.cli.arguments import RUNS, JsonOption, RunArgument, RunsOption, run_of
from klab.harness.cli.table import console, show
from klab.harness.cli.text import show_json
from klab.harness.store import CellFolder, Run

_CHUNK = 1 << 18


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
    outputs = {str(path): tail(path, lines) for path in _outputs(opened, events)}
    if as_json:
        relative = {str(Path(path).relative_to(opened.path)): text for path, text in outputs.items()}
        show_json({"cell": folder.id, "attempts": events, "error": error, "output": relative})
        return
    screen = console()
    if not events:
        screen.print(f"{folder.id} was not started yet")
        return
    show(("when", "event", "details"), [(_when(event["at"]), event["event"], _details(event)) for event in events])
    _print_error(folder, error)
    for path, text in outputs.items():
        screen.print(f"\n[bold]{escape(path)}[/]", soft_wrap=True)
        screen.print(text, markup=False, soft_wrap=True)


def tail(path: Path, lines: int) -> str:
    """The last lines of a text file, "" when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _CHUNK))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def _outputs(run: Run, events: list[dict[str, Any]]) -> list[Path]:
    """Standard output and error of the newest job, as far as they lie in the run folder."""
    named = [event["log"] for event in events if isinstance(event.get("log"), str) and event["log"]]
    if not named:
        return []
    error = (run.path / named[-1]).resolve()
    if not error.is_relative_to(run.path):
        return []
    return [path for path in (error.with_suffix(".out"), error) if path.is_file()]


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
