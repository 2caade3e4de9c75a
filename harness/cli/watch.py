"""`klab watch`: a live table of a run, with the curve of every cell that is shown."""

from __future__ import annotations

import math
import time
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live

from klab.grid import UserError
from klab.harness.cli.arguments import RUNS, JsonOption, RunArgument, RunsOption, run_of
from klab.harness.cli.progress import board, report_problem, resting
from klab.harness.cli.table import console, table
from klab.harness.cli.text import show_json
from klab.harness.cli.tracking import Tracking, require_trackers
from klab.harness.dispatch.pace import Pace
from klab.harness.dispatch.status import CellStatus, statuses
from klab.harness.store import Run
from klab.reports.sparkline import sparkline

_ORDER = (
    *("running", "failed", "diverged", "lost", "held", "preempted", "stopped", "finished"),
    *("queued", "unknown", "waiting", "cancelled"),
)


def watch(
    run: RunArgument,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Cells to show.")] = 20,
    every: Annotated[float, typer.Option("--every", min=0.2, help="Seconds between looks.")] = 2.0,
    track: Annotated[
        list[str] | None,
        typer.Option("--track", help="Send the curves to tensorboard, wandb, mlflow or trackio."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Watch a run until nothing runs any more: reward, KL and entropy of its cells as small curves. Ctrl-C leaves the
    jobs alone.
    """
    opened = run_of(run, runs)
    require_trackers(tuple(track or ()))
    if as_json:
        show_json([curves(opened, row) for row in chosen(statuses(opened), rows)])
        return
    pace, tracking = Pace(), Tracking(opened, track or ())
    if once:
        found = statuses(opened)
        console().print(screen(opened, found, pace, rows))
        if report_problem(opened, found):
            raise typer.Exit(1)
        return
    try:
        with Live(console=console(), refresh_per_second=4) as live:
            while True:
                found = statuses(opened)
                live.update(screen(opened, found, pace, rows))
                if resting(found):
                    tracking.finish()
                    break
                tracking.tick()
                time.sleep(every)
    except KeyboardInterrupt:
        console().print(f"\nThe jobs go on. Watch them again: klab watch {opened.path}", markup=False)
        return
    if report_problem(opened, found):
        raise typer.Exit(1)


def chosen(found: list[CellStatus], most: int) -> list[CellStatus]:
    """The cells to show: those that run or went wrong first."""
    return sorted(found, key=lambda row: _ORDER.index(row.state))[:most]


def curves(run: Run, row: CellStatus) -> dict[str, object]:
    """What is known of a cell's way so far; a damaged file counts as no curve."""
    try:
        metrics = run.cell(row.id).metrics()
    except UserError:
        metrics = []
    keys = ("reward_mean", "k3", "entropy")
    series = {
        key: [value if isinstance(value := line.get(key), int | float) else math.nan for line in metrics]
        for key in keys
    }
    return {"id": row.id, "state": row.state, "update": row.update or len(metrics), "updates": row.updates, **series}


def screen(run: Run, found: list[CellStatus], pace: Pace, most: int) -> RenderableType:
    """The progress board and, under it, one line per shown cell."""
    lines = []
    for row in chosen(found, most):
        known = curves(run, row)
        reward, kl, entropy = (list(known[key]) for key in ("reward_mean", "k3", "entropy"))  # type: ignore[call-overload]
        lines.append(
            (
                row.id,
                row.state,
                f"{known['update']}/{row.updates}",
                sparkline(reward, 24, 0.0 if min(reward, default=0.0) >= 0 else None),
                reward[-1] if reward else row.reward,
                sparkline(kl, 12),
                kl[-1] if kl else None,
                sparkline(entropy, 12),
            )
        )
    parts: list[RenderableType] = [board(run.name, found, pace.left(found))]
    parts.append(table(("cell", "state", "update", "reward", "", "KL per token", "", "entropy"), lines))
    if len(found) > most:
        parts.append(f"… and {len(found) - most} more (--rows)")
    return Group(*parts)
