"""What the page asks for, as plain data of bounded size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from klab.grid import UserError
from klab.harness.serve.cells import Row, plain_row
from klab.harness.serve.curves import PANELS, lines
from klab.harness.serve.live_run import LiveRun
from klab.harness.serve.series import spark
from klab.harness.serve.table import View, cells_page, configurations_page
from klab.harness.serve.text import clipped, ending, flat
from klab.harness.store.job_output import job_output

LINES = 8
"""Lines in a drawing, at most."""
SEEDS = 32
"""Cells of a configuration that its line is the mean of, at most."""
_FEED_CELLS = 12
_FEED = 24
_ATTEMPTS = 50
_OUTPUT_LINES = 60
_LETTERS = 16_000


def run_answer(live: LiveRun) -> dict[str, Any]:
    """The head of a run's page, with the axes that its cells can be chosen by."""
    return {**live.head(), "axes": live.axes, "folder": clipped(str(live.run.path), 300)}


def cells_answer(live: LiveRun, view: View) -> dict[str, Any]:
    """A page of the table of cells; each line with a small curve of the training reward."""
    rows, page, total = cells_page(list(live.rows.values()), view)
    found = []
    for row in rows:
        reward = live.curves.look(row.cell.id).series.get("reward_mean") if row.at is not None else None
        found.append({**plain_row(row), "spark": spark(reward) if reward is not None else []})
    return {"rows": found, "page": page, "size": view.size, "total": total}


def configurations_answer(live: LiveRun, view: View) -> dict[str, Any]:
    """A page of the table of configurations."""
    rows, page, total = configurations_page(list(live.rows.values()), view)
    return {"rows": rows, "page": page, "size": view.size, "total": total}


def curves_answer(live: LiveRun, by_cell: bool, ids: Sequence[str]) -> dict[str, Any]:
    """The curves of some configurations (means over seeds, with the range of these) or cells.

    Args:
        ids: which; without any, those that `LiveRun.begun` chooses.
    """
    found: list[dict[str, Any]] = []
    behind = False
    chosen = list(dict.fromkeys(ids))[:LINES] or (_first_cells(live) if by_cell else live.begun(6))
    for name in chosen:
        rows = [live.rows[name]] if by_cell and name in live.rows else [] if by_cell else live.cells_of(name)
        if not rows:
            continue
        cells = [live.curves.look(row.cell.id) for row in rows[:SEEDS] if row.at is not None]
        behind = behind or any(cell.behind for cell in cells)
        label = rows[0].cell.label
        if by_cell and rows[0].cell.seed is not None:
            label = f"{label}, seed {rows[0].cell.seed}"
        drawn = sum(bool(cell.series) for cell in cells)
        found.append({"id": name, "label": label, "cells": len(rows), "drawn": drawn, "lines": lines(cells)})
    return {"panels": _panels(found), "curves": found, "behind": behind}


def completions_answer(live: LiveRun) -> dict[str, Any]:
    """The newest completions of the cells that were heard of last."""
    found = []
    for row in live.newest(_FEED_CELLS):
        curves = live.curves.look(row.cell.id)
        if curves.evaluations:
            newest = curves.evaluations[-1]
            for sample in newest.samples[: max(2, _FEED // _FEED_CELLS)]:
                found.append({**_named(row), "update": newest.update, **sample})
    return {"completions": found[:_FEED]}


def cell_answer(live: LiveRun, identity: str) -> dict[str, Any] | None:
    """Everything about one cell; None where the run has no such cell."""
    row = live.rows.get(identity)
    if row is None:
        return None
    found: dict[str, Any] = {**plain_row(row), "run": live.run.name, "settings": [], "attempts": [], "output": []}
    if identity not in live.run.manifest["cells"]:  # it waits for its settings
        return {**found, "panels": [], "curves": [], "completions": [], "behind": False}
    curves = live.curves.look(identity)
    found["settings"] = _settings(live.run.resolved(identity))
    found["problem"] = curves.problem
    own = {"id": identity, "label": row.cell.label, "cells": 1, "drawn": 1, "lines": lines([curves])}
    evaluations = [{"update": each.update, "samples": list(each.samples)} for each in reversed(curves.evaluations)]
    return {
        **found,
        **_life(live, identity),
        "seeds": [{"id": each.cell.id, "seed": each.cell.seed} for each in live.cells_of(row.cell.group)[:100]],
        "panels": _panels([own]),
        "curves": [own],
        "behind": curves.behind,
        "completions": evaluations,
        "values": {panel.key: curves.last(panel.key) for panel in PANELS},
    }


def _first_cells(live: LiveRun) -> list[str]:
    running = [row for row in live.rows.values() if row.status.state == "running"]
    return [row.cell.id for row in (running or [row for row in live.rows.values() if row.status.update > 0])[:6]]


def _life(live: LiveRun, identity: str) -> dict[str, Any]:
    """Attempts, error and output of a cell whose folder is one, and no link."""
    folder = live.run.cell(identity)
    if folder.path.is_symlink() or folder.path.parent.is_symlink():
        return {"attempts": [], "error": None, "output": []}
    try:
        events, error = folder.attempts(), folder.error()
    except (UserError, OSError) as trouble:
        return {"attempts": [], "error": clipped(str(trouble), 2000), "output": []}
    output = job_output(live.run, events, _OUTPUT_LINES)
    return {
        "attempts": [_event(event) for event in events[-_ATTEMPTS:]],
        "error": ending(error, _LETTERS),
        "output": [{"file": name, "text": ending(text, _LETTERS)} for name, text in output.items() if text],
    }


def _event(event: Mapping[str, Any]) -> dict[str, Any]:
    hidden = ("event", "at", "log")
    details = ", ".join(
        f"{clipped(key, 40)} {clipped(value, 200)}"
        for key, value in list(event.items())[:20]
        if key not in hidden and value not in ("", None)
    )
    return {"event": clipped(event["event"], 60), "at": min(max(float(event["at"]), 0.0), 1e11), "details": details}


def _settings(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    sections = {key: record.get(key) for key in ("objective", "task", "policy", "training")}
    return [
        {"section": name, "entries": flat(section)}
        for name, section in sections.items()
        if isinstance(section, Mapping)
    ]


def _panels(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The drawings that have a line."""
    keys = {key for each in found for key in each["lines"]}
    return [{"key": panel.key, "title": panel.title, "unit": panel.unit} for panel in PANELS if panel.key in keys]


def _named(row: Row) -> dict[str, Any]:
    return {"cell": row.cell.id, "label": row.cell.label, "seed": row.cell.seed, "state": row.status.state}
