"""One cell of an archive beside its repetition: the same bits, or how far the numbers are apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from klab.grid import UserError
from klab.harness.store import CellFolder
from klab.harness.store.archive import Archive, damaged_archive
from klab.harness.store.digest import TIMING, digest
from klab.reports.archive import read_archive
from klab.reports.frame import evaluation_numbers
from klab.reports.numeric_frame import Block
from klab.reports.words import number

_SHOWN = ("reward", "accuracy", "reverse_kl")


@dataclass(frozen=True)
class ArchivedCell:
    """What an archive has of one cell.

    Attributes:
        digests: of the rows of metrics and of evaluations.
        hardware, versions: that trained it.
        metrics, evaluations: its rows, in the order of updates.
    """

    id: str
    digests: tuple[str, str]
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    metrics: pd.DataFrame
    evaluations: pd.DataFrame


@dataclass(frozen=True)
class Deviation:
    """A repetition beside what was archived.

    Attributes:
        same: whether metrics and evaluations have the same bits.
        first: where they differ first, in words; empty where they are the same.
        distances: how far evaluations are apart, in words.
        circumstances: what else was not the same: processor, kernels, versions.
        rows: how many rows were compared, in words.
        first_evaluation: by quantity, what the evaluation before the first update gave, archived and now.
    """

    same: bool
    first: str
    distances: tuple[str, ...]
    circumstances: tuple[str, ...]
    rows: str
    first_evaluation: Mapping[str, tuple[float, float]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def archived_cell(archive: Archive, identity: str) -> ArchivedCell:
    """What the archive has of a cell.

    Raises:
        UserError: the cell has no result, or the archive is damaged.
    """
    frames = read_archive(archive)
    cells = archive.table("cells")
    place = list(cells["cell"]).index(identity)
    texts = {}
    for name in ("metrics_sha256", "evaluations_sha256", "hardware", "software"):
        column = cells.get(name)
        if not isinstance(column, list):
            raise damaged_archive(archive.path / "cells.parquet", f"has no texts {name!r}")
        texts[name] = column[place] or ""
    state = str(cells["state"][place])
    if state not in ("finished", "diverged", "stopped"):
        raise UserError(f"is {state} in this archive: there is nothing to compare with", key="cell", value=identity)
    return ArchivedCell(
        identity,
        (texts["metrics_sha256"], texts["evaluations_sha256"]),
        _object(texts["hardware"]),
        {str(name): str(version) for name, version in _object(texts["software"]).items()},
        _rows(frames.metrics, identity),
        _rows(frames.evaluations, identity),
    )


def deviation(stored: ArchivedCell, repeated: CellFolder) -> Deviation:
    """How far a repetition is from what was archived."""
    metrics, evaluations = repeated.metrics(), repeated.evaluations()
    same = (digest(metrics), digest(evaluations)) == stored.digests
    now = [_frame(repeated.id, rows) for rows in (metrics, [evaluation_numbers(row) for row in evaluations])]
    found = [
        *_differences("evaluations", stored.evaluations, now[1], np.float64),
        *_differences("metrics", stored.metrics, now[0], np.float32),
    ]
    first = min(found, key=lambda place: place[0], default=(0, "only in what the archive does not keep"))[1]
    before, after = stored.evaluations, now[1]
    return Deviation(
        same=same,
        first="" if same else first,
        distances=() if same else tuple(_distances(before, after)),
        circumstances=tuple(_circumstances(stored, repeated)),
        rows=f"{len(metrics)} updates, {len(evaluations)} evaluations",
        first_evaluation={
            name: (float(before[name].iloc[0]), float(after[name].iloc[0]))
            for name in _SHOWN
            if len(before) and len(after) and name in before and name in after
        },
    )


def _differences(
    name: str, before: pd.DataFrame, after: pd.DataFrame, kind: type[np.floating[Any]]
) -> Iterator[tuple[int, str]]:
    """The first update, and what differs in it, of every column."""
    updates = np.intersect1d(before["update"], after["update"])
    if len(updates) < max(len(before), len(after)):
        yield (
            int(updates.max(initial=0)) + 1,
            f"{name}: {len(before)} rows were archived, the repetition has {len(after)}",
        )
    old, new = (frame.set_index("update").loc[updates] for frame in (before, after))
    for column in old:
        if str(column).startswith(TIMING) or old[column].isna().all():
            continue
        left = old[column].to_numpy(dtype=kind)
        right = new[column].to_numpy(dtype=kind) if column in new else np.full(len(updates), np.nan, dtype=kind)
        unlike = ~((left == right) | (np.isnan(left) & np.isnan(right)))
        if unlike.any():
            at = int(np.argmax(unlike))
            yield (
                int(updates[at]),
                f"{name}, update {updates[at]}, {column}: {left[at]!s} was archived, now {right[at]!s}",
            )


def _distances(before: pd.DataFrame, after: pd.DataFrame) -> Iterator[str]:
    updates = np.intersect1d(before["update"], after["update"])
    if not len(updates):
        return
    old, new = (frame.set_index("update").loc[updates] for frame in (before, after))
    for at, title in ((0, "At the first evaluation"), (-1, "At the last evaluation")):
        words = [
            f"{name} {number(float(old[name].iloc[at]))}, now {number(float(new[name].iloc[at]))}"
            for name in _SHOWN
            if name in old and name in new
        ]
        yield f"{title} (update {updates[at]}) the archive has {'; '.join(words)}."


def _circumstances(stored: ArchivedCell, repeated: CellFolder) -> Iterator[str]:
    """What else was not the same, and therefore may explain other bits."""
    result = repeated.result() or {}
    here, versions = result.get("hardware") or {}, result.get("versions") or {}
    for name in ("processor", "kernels", "device", "threads", "processes"):
        before, now = stored.hardware.get(name), here.get(name)
        if before != now:
            yield f"The archived numbers were computed with {name} {before}, these with {now}."
    changed = [
        f"{name} {before}, now {versions[name]}"
        for name, before in stored.versions.items()
        if name in versions and str(versions[name]) != before
    ]
    if changed:
        yield f"The archived numbers were made with {'; '.join(changed)}."


def _rows(frame: pd.DataFrame, identity: str) -> pd.DataFrame:
    return frame[frame["cell"] == identity].drop(columns="cell").reset_index(drop=True)


def _frame(identity: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    block = Block(())
    block.add(identity, rows)
    return block.frame().drop(columns="cell")


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
