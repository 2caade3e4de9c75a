"""The frames of a run as an archive keeps them, and as they are read from it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from klab.grid import UserError
from klab.grid.score import LM_EVAL, RESULTS
from klab.harness.store import CellFolder, Run
from klab.harness.store import archive as store
from klab.harness.store.archive import Archive, damaged_archive
from klab.harness.store.column_table import Numbers
from klab.harness.store.digest import digest
from klab.harness.store.usage import span, used
from klab.reports.frame import Frames, read_frames
from klab.reports.schema import EVALUATIONS, METRICS

KEPT_METRICS = (
    "rollout",
    "reward_mean",
    "kl_behaviour",
    "entropy",
    "gradient_norm",
    "ess",
    "clip_fraction",
    "informative_groups",
    "tokens",
    "sampled_groups",
    "unused_tokens",
    "beta",
    "trust_coefficient",
    "entropy_coefficient",
    "explained_variance",
)
"""Columns of the metrics that an archive keeps: those that the page draws or counts."""

_TEXTS = ("cell", "state", "error", "software")
_STATES = ("finished", "diverged", "stopped", "failed", "damaged", "running", "interrupted", "missing")
_SAMPLES = ("cell", "update", "prompt", "completion", "reward")


def frames_of(run: Run, cache: bool = True) -> Frames:
    """The tidy frames of a run, or of an archive: the same but for what the archive leaves out."""
    return read_archive(run) if isinstance(run, Archive) else read_frames(run, cache)


def write_archive(run: Run, out: Path) -> None:
    """Write the archive of a run into the folder `out`.

    Cells and evaluations are kept as they are, but for completions; of the metrics, `KEPT_METRICS` are, in single
    precision.

    Raises:
        UserError: the run is an archive itself, or there is something else at this place.
        OSError: it cannot be written.
    """
    if isinstance(run, Archive):
        raise UserError("is an archive already", file=run.path)
    frames = read_frames(run)
    metrics = frames.metrics.drop(columns=["cell", "update"])
    kept = [name for name in KEPT_METRICS if name in metrics and metrics[name].notna().any()]
    left = [str(name) for name in metrics if name not in kept and metrics[name].notna().any()]
    spent, when = used(run), span(run)
    head = {
        "name": run.name,
        "began": None if when is None else when[0],
        "ended": None if when is None else when[1],
        "usage": {"gpu_hours": spent.gpu_hours, "cpu_hours": spent.cpu_hours, "hours": spent.hours},
        "left_out": {"metrics": left, "completions": len(frames.samples)},
    }
    tables = {
        "cells": _cells_table(run, frames.cells),
        "evaluations": _rows_table(frames.evaluations, [str(name) for name in frames.evaluations][2:], exact=True),
        "metrics": _rows_table(frames.metrics, kept, exact=False),
    }
    store.write(run, out, tables, head)


def read_archive(archive: Archive) -> Frames:
    """The frames of an archive. There are no completions in it; columns of metrics that it leaves out are NaN.

    Raises:
        UserError: one of its files is damaged.
    """
    known = archive.manifest["cells"]
    cells = archive.table("cells")
    file = archive.path / "cells.parquet"
    metrics = [name for name in cells if name.startswith(LM_EVAL)]
    numbers = [*RESULTS, *metrics]
    sound = (
        all(isinstance(cells.get(name), list) for name in _TEXTS)
        and all(isinstance(cells.get(name), np.ndarray) for name in numbers)
        and sorted(map(str, cells["cell"])) == sorted(known)
        and all(state in _STATES for state in cells["state"])
    )
    if not sound:
        raise damaged_archive(file, "does not say how every cell ended")
    order = {identity: place for place, identity in enumerate(known)}
    table = pd.DataFrame({name: cells[name] for name in (*_TEXTS, *numbers)})
    table = table.sort_values("cell", key=lambda column: column.map(order), ignore_index=True)
    table = table.astype({**dict.fromkeys(_TEXTS, "str"), **dict.fromkeys(numbers, "float64")})
    return Frames(
        table,
        _frame(archive, "metrics", METRICS),
        _frame(archive, "evaluations", EVALUATIONS),
        pd.DataFrame(columns=list(_SAMPLES)),
    )


def left_out_words(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """What a reader should know of runs that are archives."""
    found = []
    for run, name in zip(runs, names, strict=True):
        if isinstance(run, Archive):
            columns, completions = len(run.left_out["metrics"]), run.left_out["completions"]
            missing = [f"{columns} columns of its metrics"] if columns else []
            missing += [f"{completions} stored completions"] if completions else []
            found.append(
                f"{name} is read from an archive, which keeps the metrics of updates in single precision"
                + (f" and leaves {' and '.join(missing)} out." if missing else ".")
            )
    return found


def _cells_table(run: Run, cells: pd.DataFrame) -> dict[str, Numbers | Sequence[str | None]]:
    """The frame of cells, with configuration and seed, digests of what each measured, and what trained it."""
    folders = [run.cell(identity) for identity in cells["cell"]]
    records = [run.resolved(identity) for identity in cells["cell"]]
    sound = [state != "damaged" for state in cells["state"]]
    pairs = list(zip(folders, sound, strict=True))
    return {
        **{name: [_text(value) for value in cells[name]] for name in _TEXTS},
        "group": [str(record["group"]) for record in records],
        "seed": np.array([int(record["seed"]) for record in records], dtype=np.int64),
        "metrics_sha256": [digest(folder.metrics()) if whole else "" for folder, whole in pairs],
        "evaluations_sha256": [digest(folder.evaluations()) if whole else "" for folder, whole in pairs],
        "hardware": [_hardware(folder) if whole else "" for folder, whole in pairs],
        **{
            str(name): cells[name].to_numpy(dtype=np.float64) for name in cells if name not in _TEXTS and name != "mark"
        },
    }


def _hardware(folder: CellFolder) -> str:
    found = (folder.result() or {}).get("hardware")
    return json.dumps(found, sort_keys=True) if isinstance(found, Mapping) else ""


def _rows_table(frame: pd.DataFrame, columns: Sequence[str], exact: bool) -> dict[str, Numbers | Sequence[str | None]]:
    """Rows of cells with these columns; those without a number in any row are left out."""
    return {
        "cell": frame["cell"].astype("str").tolist(),
        "update": frame["update"].to_numpy(dtype=np.int64),
        **{
            name: _narrowed(frame[name].to_numpy(dtype=np.float64), exact)
            for name in columns
            if frame[name].notna().any()
        },
    }


def _narrowed(values: Numbers, exact: bool) -> Numbers:
    """Whole numbers as such; others in single precision, unless they must be exact or exceed its range."""
    finite = bool(np.isfinite(values).all())
    if finite and (values == np.trunc(values)).all() and np.abs(values).max(initial=0.0) < 2**31:
        whole = values.astype(np.int32)
        return values if np.signbit(values[whole == 0]).any() else whole
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    present = values[np.isfinite(values)]
    counts = bool((present == np.trunc(present)).all())
    same = np.array_equal(single.astype(np.float64), values, equal_nan=True)
    if exact or counts:
        return single if same else values
    return single if np.isfinite(single[np.isfinite(values)]).all() else values


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _frame(archive: Archive, name: str, documented: Mapping[str, str]) -> pd.DataFrame:
    """A frame of rows of cells, with the columns that `Block` gives a run's."""
    found = archive.table(name)
    file = archive.path / f"{name}.parquet"
    cells, updates = found.pop("cell", None), found.pop("update", None)
    if not isinstance(cells, list) or not isinstance(updates, np.ndarray) or updates.dtype.kind != "i":
        raise damaged_archive(file, "does not say of which cells its rows are")
    if any(isinstance(column, list) for column in found.values()):
        raise damaged_archive(file, "has texts where numbers belong")
    kind = pd.CategoricalDtype(pd.Index(list(dict.fromkeys(map(str, cells))), dtype="str"))
    if not set(kind.categories) <= set(archive.manifest["cells"]):
        raise damaged_archive(file, "has rows of cells that the run does not have")
    column = pd.Categorical(cells, dtype=kind)
    _check_order(column.codes, updates, file)
    names = [each for each in documented if each != "update"]
    absent = archive.left_out["metrics"] if name == "metrics" else []
    names += [each for each in [*found, *absent] if each not in names]
    numbers: dict[str, Any] = {
        each: np.asarray(found[each], dtype=np.float64) if each in found else np.full(len(updates), np.nan)
        for each in names
    }
    return pd.DataFrame({"cell": column, "update": updates.astype(np.int64), **numbers})


def _check_order(codes: Numbers, updates: Numbers, file: Path) -> None:
    """Raises UserError where the rows of a cell do not follow one another by update."""
    same = codes[1:] == codes[:-1]
    blocks = 1 + int((~same).sum()) if codes.size else 0
    if (updates[1:] <= updates[:-1])[same].any() or (updates < 0).any() or blocks > len(np.unique(codes)):
        raise damaged_archive(file, "has rows of a cell out of order")
