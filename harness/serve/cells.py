"""The lines of the page's tables: what a cell is and how it stands; configurations are cells but for their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klab.grid import UserError
from klab.harness.dispatch.status import CellStatus
from klab.harness.serve.series import finite
from klab.harness.serve.text import clipped
from klab.harness.store import Run, Snapshot

_PLAIN = ("none", "one", "raw", "yes", "no", "true", "false", "null")
"""Values that do not say by themselves which axis they belong to."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a cell is, as the manifest has it.

    Attributes:
        place: its place in the grid's order.
        group: id of its configuration.
        label: how the grid file writes the configuration, in few words.
        values: its values on the varied axes, as `axis=value`, in every spelling that the grid file has for it.
    """

    id: str
    place: int
    group: str
    label: str
    seed: int | None
    values: frozenset[str]


@dataclass(frozen=True, slots=True)
class Row:
    """A cell in the table.

    Attributes:
        at: when it was last heard of, in seconds since 1970: its newest heartbeat, or its result.
        kl: KL to the reference of the last evaluation, of a cell with a result.
        text: what a search looks in, in lower case.
    """

    cell: Identity
    status: CellStatus
    at: float | None
    kl: float | None
    text: str

    @property
    def done(self) -> float:
        """Share of its updates."""
        return min(1.0, self.status.update / self.status.updates) if self.status.updates > 0 else 0.0

    @property
    def reward(self) -> float | None:
        """The newest or the final reward, where it is a number."""
        return finite(self.status.reward)


def identity_of(run: Run, identity: str, place: int) -> Identity:
    """What the manifest says of a cell; of one that waits for its settings, and is not in it yet, only its name."""
    try:
        record = run.resolved(identity) if identity in run.manifest["cells"] else {}
    except UserError:
        record = {}
    group, seed = record.get("group"), record.get("seed")
    written = record.get("spellings")
    spellings = [each for each in written if isinstance(each, str)][:64] if isinstance(written, list) else []
    group = group if isinstance(group, str) else identity
    values = frozenset(part for spelling in spellings for part in spelling.split(", ") if "=" in part)
    return Identity(identity, place, group, label_of(spellings, group), seed if type(seed) is int else None, values)


def label_of(spellings: Sequence[str], group: str) -> str:
    """A configuration in few words: `estimator k1`; of several axes, values that speak for themselves: `k1, loss`."""
    if not spellings:
        return group
    parts = [part.partition("=") for part in spellings[0].split(", ")]
    brief = len(parts) > 2
    words = []
    for key, sign, value in parts:
        clear = brief and value[:1].isalpha() and value.lower() not in _PLAIN
        name = key.removeprefix("training.").removeprefix("objective.")
        words.append(value if sign and clear else f"{name} {value}".strip())
    return clipped(", ".join(words), 160)


def row_of(cell: Identity, status: CellStatus, snapshot: Snapshot | None, ended_at: float | None) -> Row:
    """The line of a cell."""
    result = (snapshot.result if snapshot is not None else None) or {}
    heard = finite(((snapshot.heartbeat if snapshot is not None else None) or {}).get("at"))
    text = f"{cell.id}\n{cell.label}\n{status.detail[:400]}".lower()
    return Row(cell, status, ended_at if ended_at is not None else heard, finite(result.get("reverse_kl_final")), text)


def plain_row(row: Row) -> dict[str, Any]:
    """A line of the table of cells, for the page."""
    status = row.status
    return {
        "id": row.cell.id,
        "label": row.cell.label,
        "group": row.cell.group,
        "seed": row.cell.seed,
        "state": status.state,
        "update": _bounded(status.update),
        "updates": _bounded(status.updates),
        "reward": row.reward,
        "kl": row.kl,
        "at": None if row.at is None else round(row.at),
        "detail": clipped(status.detail, 300),
        "job": clipped(status.job, 60),
        "executor": clipped(status.executor, 30),
        "left": None if finite(status.seconds_left) is None else round(finite(status.seconds_left) or 0.0, -1),
    }


def plain_configuration(group: str, rows: Sequence[Row]) -> dict[str, Any]:
    """A line of the table of configurations, for the page: its seeds, and what they have in common."""
    rewards = [reward for row in rows if (reward := row.reward) is not None]
    kls = [row.kl for row in rows if row.kl is not None]
    return {
        "id": group,
        "label": rows[0].cell.label,
        "cells": len(rows),
        "states": states_of(rows),
        "done": round(sum(row.done for row in rows) / len(rows), 4),
        "reward": sum(rewards) / len(rewards) if rewards else None,
        "low": min(rewards, default=None),
        "high": max(rewards, default=None),
        "kl": sum(kls) / len(kls) if kls else None,
        "at": max((round(row.at) for row in rows if row.at is not None), default=None),
    }


def states_of(rows: Sequence[Row]) -> dict[str, int]:
    """How many of these cells are in each state."""
    found: dict[str, int] = {}
    for row in rows:
        found[row.status.state] = found.get(row.status.state, 0) + 1
    return found


def axes_of(manifest: Mapping[str, Any], cells: Sequence[Identity]) -> list[dict[str, Any]]:
    """The varied axes and the values that cells have on them, to choose cells by."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        for value in cell.values:
            found.setdefault(value.partition("=")[0], {}).setdefault(value.partition("=")[2])
    written = [key for key in manifest.get("axes", {}) if key in found]
    keys = [*written, *sorted(found.keys() - set(written))][:12]
    return [{"key": key, "values": sorted(found[key], key=_by_value)[:60]} for key in keys]


def _by_value(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), ""
    except ValueError:
        return True, 0.0, text


def _bounded(count: int) -> int:
    return min(count, 2**53)
