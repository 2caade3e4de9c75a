"""Progress of a run: cells in each state, reward, time left; live on a terminal, line by line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.text import Text

from klab.harness.cli.table import console, duration, state_text, table
from klab.harness.cli.text import printable
from klab.harness.dispatch.pace import Pace
from klab.harness.dispatch.status import CellStatus, controller_problem, count, statuses
from klab.harness.store import Run

if TYPE_CHECKING:
    from klab.harness.training.runner import Progress

POLL_SECONDS = 1.0
PLAIN_SECONDS = 10.0
"""Between two lines where standard output is not a terminal."""

_SHOWN = 12


def follow(run: Run, quiet: bool = False, each: Callable[[], None] = lambda: None) -> bool:
    """Show progress until nothing runs or waits any more, or until Ctrl-C, which leaves the jobs alone.

    Args:
        run: the run.
        quiet: show nothing.
        each: called at every look.

    Returns:
        Whether the run came to rest; False after Ctrl-C.
    """
    pace = Pace()
    try:
        if quiet or not sys.stdout.isatty():
            _plainly(run, pace, quiet, each)
        else:
            with Live(console=console(), refresh_per_second=4) as live:
                while True:
                    began = time.monotonic()
                    rows = statuses(run)
                    each()
                    live.update(board(run.name, rows, pace.left(rows)))
                    if resting(rows):
                        break
                    _pause(time.monotonic() - began)
    except KeyboardInterrupt:
        console().print(f"\nThe jobs go on. Watch them again: klab status --watch {run.path}", markup=False)
        return False
    return True


def report_problem(run: Run, rows: Sequence[CellStatus]) -> str | None:
    """Why waiting cells will not start, also printed on standard error: their controller is gone. None: they will."""
    problem = controller_problem(run, rows)
    if problem is not None:
        print(f"klab: {problem}", file=sys.stderr)
    return problem


def resting(rows: Sequence[CellStatus]) -> bool:
    """Whether no cell runs or stands in a queue."""
    return not any(
        row.state in ("running", "queued", "unknown") or (row.state == "preempted" and row.job) for row in rows
    )


def board(name: str, rows: Sequence[CellStatus], left: float | None) -> RenderableType:
    """One bar over all updates, the number of cells in each state, and the running cells."""
    done, whole = sum(row.update for row in rows), sum(row.updates for row in rows)
    running = [row for row in rows if row.state == "running"]
    states = "  ".join(f"{number} {state_text(state)}" for state, number in count(rows).items())
    rewards = [row.reward for row in running if row.reward is not None]
    reward = f"  reward {sum(rewards) / len(rewards):.3f}" if rewards else ""
    ahead = f"{duration(left)} left" if left is not None else ""
    lines: list[RenderableType] = [
        Text.from_markup(f"[bold]{escape(printable(name))}[/]  {states}{reward}  {ahead}"),
        ProgressBar(total=max(1, whole), completed=done, width=60),
    ]
    if running:
        shown = [(row.id, f"{row.update}/{row.updates}", row.reward, row.detail) for row in running[:_SHOWN]]
        lines.append(table(("running", "update", "reward", ""), shown))
    if len(running) > _SHOWN:
        lines.append(Text(f"… and {len(running) - _SHOWN} more"))
    return Group(*lines)


class Board:
    """Progress of cells that train in this very process."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._rows: dict[str, CellStatus] = {}
        self._name = ""
        self._pace = Pace()
        self._shown = 0.0

    @contextmanager
    def live(self, run: Run, retry_failed: bool = False) -> Iterator[None]:
        """Show the board while the body runs."""
        self._name = run.name
        self._rows = {row.id: row for row in statuses(run, ())}
        if not sys.stdout.isatty():
            yield
            return
        with Live(console=console(), refresh_per_second=4) as self._live:
            yield

    def tell(self, progress: Progress) -> None:
        """Called by training after every update of every cell."""
        state = "finished" if progress.update >= progress.updates else "running"
        self._rows[progress.cell] = CellStatus(
            progress.cell,
            "finished" if state == "finished" else "running",
            update=progress.update,
            updates=progress.updates,
            reward=progress.reward,
        )
        rows = list(self._rows.values())
        left = self._pace.left(rows)
        now = time.monotonic()
        if self._live is not None:
            if now - self._shown > 0.25:
                self._shown = now
                self._live.update(board(self._name, rows, left))
        elif now - self._shown > PLAIN_SECONDS:
            self._shown = now
            print(plain_line(rows, left), flush=True)


def plain_line(rows: Sequence[CellStatus], left: float | None) -> str:
    """The board in one line, for logs."""
    done, whole = sum(row.update for row in rows), sum(row.updates for row in rows)
    rewards = [row.reward for row in rows if row.state == "running" and row.reward is not None]
    parts = [", ".join(f"{number} {state}" for state, number in count(rows).items()), f"update {done} of {whole}"]
    if rewards:
        parts.append(f"reward {sum(rewards) / len(rewards):.3f}")
    if left:
        parts.append(f"{duration(left)} left")
    return "; ".join(parts)


def _plainly(run: Run, pace: Pace, quiet: bool, each: Callable[[], None]) -> None:
    printed = -PLAIN_SECONDS
    while True:
        began = time.monotonic()
        rows = statuses(run)
        each()
        left = pace.left(rows)
        over = resting(rows)
        if not quiet and (over or time.monotonic() - printed >= PLAIN_SECONDS):
            printed = time.monotonic()
            print(plain_line(rows, left), flush=True)
        if over:
            return
        _pause(time.monotonic() - began)


def _pause(spent: float) -> None:
    """Wait until the next look; looking at a large run must not take the processor from training."""
    time.sleep(max(POLL_SECONDS, 15 * spent))
