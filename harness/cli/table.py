"""Tables and coloured text for people."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from klab.harness.cli.text import printable

STYLES = {
    "finished": "green",
    "diverged": "magenta",
    "stopped": "magenta",
    "running": "cyan",
    "queued": "blue",
    "held": "yellow",
    "waiting": "dim",
    "preempted": "yellow",
    "unknown": "yellow",
    "lost": "yellow",
    "cancelled": "dim",
    "failed": "red",
}
"""Colours of cell states."""


_PLAIN_WIDTH = 160

_WHOLE = ("cell", "running", "configuration", "job")
"""Columns of names that are there to be copied: they are never broken."""

_NARROWEST = 8
"""Characters that every other column gets at least."""


class SafeConsole(Console):
    """A console whose texts may hold data: control characters in them are written out."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def console(width: int | None = None) -> SafeConsole:
    """Standard output; wide enough for ids where it is not a terminal."""
    if width is None and not sys.stdout.isatty():
        width = _PLAIN_WIDTH
    return SafeConsole(width=width, highlight=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """A table of texts and numbers; numbers stand on the right."""
    lines = [[_cell(value) for value in row] for row in rows]
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        numeric = all(isinstance(line[place], tuple) for line in lines) and bool(lines)
        made.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=column in _WHOLE)
    for line in lines:
        made.add_row(*(value[0] if isinstance(value, tuple) else value for value in line))
    return made


def show(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table; wider than the terminal, which then wraps lines, where names would have to be broken."""
    made, width = table(columns, rows, title), console().width
    whole = [column for column in made.columns if column.header in _WHOLE]
    needed = sum(max((cell_len(str(each)) for each in column.cells), default=0) for column in whole)
    needed += (_NARROWEST + 1) * (len(columns) - len(whole)) + len(whole)
    console(max(width, needed)).print(made, crop=False)


def duration(seconds: float | None) -> str:
    """Seconds in the two largest fitting units."""
    if seconds is None or not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole / 86400:.1f} days"


def state_text(state: str) -> str:
    """A state in its colour."""
    return f"[{STYLES[state]}]{state}[/]"


def _cell(value: object) -> str | tuple[str]:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return (f"{value:,}".replace(",", " "),)
    if isinstance(value, float):
        return (f"{value:.4g}",)
    text = str(value)
    return state_text(text) if text in STYLES else escape(text)
