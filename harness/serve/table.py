"""Filtering, sorting and paging of the page's tables, on the server: the page gets what it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klab.harness.serve.cells import Row, plain_configuration

SIZE = 25
LARGEST = 100
"""Lines of a page: by default, and at most."""

_ROW_KEYS: dict[str, Callable[[Row], Any]] = {
    "label": lambda row: row.cell.label,
    "seed": lambda row: row.cell.seed,
    "state": lambda row: row.status.state,
    "done": lambda row: row.done,
    "reward": lambda row: row.reward,
    "kl": lambda row: row.kl,
    "at": lambda row: row.at,
}
_CONFIGURATION_KEYS = ("label", "cells", "done", "reward", "kl", "at")


@dataclass(frozen=True, slots=True)
class View:
    """What part of a table is asked for.

    Attributes:
        words: every one of them stands in the line.
        state: of the cells; "" for all.
        axes: values on axes, as `axis=value`.
        sort: a column; "" for the grid's order.
    """

    words: tuple[str, ...] = ()
    state: str = ""
    axes: tuple[str, ...] = ()
    sort: str = ""
    down: bool = False
    page: int = 0
    size: int = SIZE

    @classmethod
    def from_query(cls, query: Mapping[str, str], axes: Sequence[str] = ()) -> View:
        """The view that the address of a request asks for; what makes no sense in it counts as not given."""
        return cls(
            words=tuple(query.get("q", "")[:200].lower().split()),
            state=query.get("state", "")[:40],
            axes=tuple(axes[:12]),
            sort=query.get("sort", "")[:40],
            down=query.get("order") == "down",
            page=min(_whole(query.get("page"), 0), 10**6),
            size=max(1, min(_whole(query.get("size"), SIZE), LARGEST)),
        )

    def has(self, row: Row) -> bool:
        """Whether a cell is in it."""
        if self.state and row.status.state != self.state:
            return False
        return all(value in row.cell.values for value in self.axes) and all(word in row.text for word in self.words)


def cells_page(rows: Sequence[Row], view: View) -> tuple[list[Row], int, int]:
    """The lines of one page of the table of cells, which page it is, and how many lines there are on all."""
    kept = [row for row in rows if view.has(row)]
    key = _ROW_KEYS.get(view.sort)
    return _page(_sorted(kept, key, view.down) if key else kept, view)


def configurations_page(rows: Sequence[Row], view: View) -> tuple[list[dict[str, Any]], int, int]:
    """The same of the table of configurations: those that have a cell in the view, with all their cells."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.cell.group, []).append(row)
    if view.state or view.words or view.axes:
        wanted = {row.cell.group for row in rows if view.has(row)}
        groups = {group: each for group, each in groups.items() if group in wanted}
    if view.sort not in _CONFIGURATION_KEYS:
        page, number, total = _page(list(groups.items()), view)
        return [plain_configuration(*each) for each in page], number, total
    found = [plain_configuration(*each) for each in groups.items()]
    return _page(_sorted(found, lambda line: line[view.sort], view.down), view)


def _sorted(lines: Sequence[Any], key: Callable[[Any], Any], down: bool) -> list[Any]:
    """By a column; lines without a value last, equal ones in the grid's order."""
    known = [(value, line) for line in lines if (value := key(line)) is not None]
    known.sort(key=lambda pair: pair[0], reverse=down)
    return [line for _, line in known] + [line for line in lines if key(line) is None]


def _page(lines: Sequence[Any], view: View) -> tuple[list[Any], int, int]:
    page = max(0, min(view.page, (len(lines) - 1) // view.size))
    return list(lines[page * view.size : (page + 1) * view.size]), page, len(lines)


def _whole(text: str | None, otherwise: int) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 8 else otherwise
