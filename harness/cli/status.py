"""`klab status`: where every cell of a run stands."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from klab.grid.schema.budget import UNITS
from klab.harness.cli.arguments import RUNS, JsonOption, RunArgument, RunsOption, run_of
from klab.harness.cli.collector import uncollected
from klab.harness.cli.progress import follow, report_problem
from klab.harness.cli.table import console, duration, show, state_text
from klab.harness.cli.text import show_json
from klab.harness.dispatch.status import CellStatus, controller_problem, count, statuses
from klab.harness.dispatch.tuning import pending
from klab.harness.store.usage import shown, used

_SHOWN = 40


def status(
    run: RunArgument,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it until nothing runs any more.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="List finished and waiting cells too.")] = False,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Show the state of every cell of a run. Exit code 1 when cells failed, or wait for a controller that ended."""
    if watch and not follow(run_of(run, runs), quiet=as_json):
        return
    with uncollected():
        opened = run_of(run, runs)
        rows = statuses(opened)
    states, budget = count(rows), opened.budget
    if as_json:
        problem = controller_problem(opened, rows)
        cells = [asdict(row) for row in rows]
        spent = None if budget is None else {"limits": budget.limits, "used": asdict(used(opened))}
        record = {"run": str(opened.path), "states": states, "cells": cells, "problem": problem}
        show_json({**record, **({} if spent is None else {"budget": spent})})
    else:
        screen = console()
        screen.print(
            f"[bold]{escape(opened.name)}[/]: " + ", ".join(f"{n} {state_text(state)}" for state, n in states.items())
        )
        if budget is not None:
            screen.print(f"budget: {', '.join(shown(used(opened), budget.limits, UNITS))} used")
        _list([row for row in rows if everything or row.state not in ("finished", "waiting")], everything)
        if opened.tuned is not None and (later := len(pending(opened))):
            screen.print(f"first stage: {later} cells of the second wait until it has chosen their settings")
        if states.get("lost") or states.get("preempted"):
            screen.print("Launching the same grid again continues lost and preempted cells.")
        problem = report_problem(opened, rows)
    if problem or states.get("failed"):
        raise typer.Exit(1)


def _list(rows: list[CellStatus], everything: bool) -> None:
    if not rows:
        return
    shown = rows if everything else rows[:_SHOWN]
    lines = [
        (row.id, row.state, f"{row.update}/{row.updates}", row.reward, _time(row), row.job, row.detail) for row in shown
    ]
    show(("cell", "state", "update", "reward", "time", "job", ""), lines)
    if len(shown) < len(rows):
        console().print(f"… and {len(rows) - len(shown)} more (--all)")


def _time(row: CellStatus) -> str:
    if row.seconds_left is not None:
        return f"{duration(row.seconds_left)} left"
    if row.since is not None and row.state not in ("finished", "diverged", "stopped"):
        return f"{duration(row.since)} ago"
    return ""
