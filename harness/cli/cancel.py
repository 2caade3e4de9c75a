"""`klab cancel`: stop cells."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from klab.grid import UserError
from klab.harness.cli.arguments import RUNS, CellsArgument, JsonOption, RunArgument, RunsOption, cells_of, run_of
from klab.harness.cli.text import say, show_json
from klab.harness.dispatch.cancel import cancel as stop
from klab.harness.dispatch.status import FINAL_STATES, statuses


def cancel(
    run: RunArgument,
    cells: CellsArgument = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Stop cells and take them out of the queue. What they measured stays; launching again takes them up."""
    opened = run_of(run, runs)
    named = set(cells_of(opened, cells)) if cells else set()
    chosen = [row for row in statuses(opened) if row.state not in FINAL_STATES and (not named or row.id in named)]
    running = [row for row in chosen if row.state == "running"]
    if len(running) > 1 and not yes:
        if not sys.stdin.isatty():
            raise UserError(f"this stops {len(running)} running cells", hint="Say --yes to do so.")
        if not typer.confirm(f"Stop {len(running)} running cells?"):
            say("nothing was stopped")
            return
    stop(opened, [row.id for row in chosen])
    if as_json:
        show_json({"run": str(opened.path), "cancelled": [row.id for row in chosen], "running": len(running)})
    else:
        say(f"{len(chosen)} cells cancelled, {len(running)} of them were running")
