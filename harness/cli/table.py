"""Output of commands: tables for people, JSON for programs, and text that is safe to print."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

STYLES = {
    "finished": "green",
    "diverged": "magenta",
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


def console() -> Console:
    """Standard output; wide enough for ids where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """A table of texts and numbers; numbers stand on the right."""
    lines = [[_cell(value) for value in row] for row in rows]
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        numeric = all(isinstance(line[place], tuple) for line in lines) and bool(lines)
        made.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for line in lines:
        made.add_row(*(value[0] if isinstance(value, tuple) else value for value in line))
    return made


def show(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table."""
    console().print(table(columns, rows, title))


def show_json(value: object) -> None:
    """Print a value as strict JSON: what is not a finite number becomes null."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def plain(value: object) -> Any:
    """The value with NaN and infinities replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


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
