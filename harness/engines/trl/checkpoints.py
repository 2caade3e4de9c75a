"""Checkpoints of a cell on TRL: those of `transformers.Trainer`, each with a marker that says that it is whole.

`cells/ID/checkpoint/checkpoint-N/` holds what the trainer saves after update N: weights as safetensors, the optimizer,
the schedule, the state of the random number generators of every process, and a reference policy that moves.
`klab.json` is written last, when everything is on the disk; a folder without it, or with a file that is shorter than it
says, counts as none. Tensors are read with `weights_only`, so that reading runs no code. TRL's buffer of rollouts is
not saved: checkpoints are made where it is used up.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from klab.harness.objective import LossCoefficients
from klab.harness.store import CellFolder, files

MARKER = "klab.json"
REFERENCE = "klab_reference.safetensors"
SCHEMA = 1
_PREFIX = "checkpoint-"
_PICKLED = "training_args.bin"
"""Written by transformers, read by nobody here."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Where a cell goes on from.

    Attributes:
        path: the checkpoint of `transformers.Trainer`.
        update: updates done.
        streak: non-finite updates in a row up to now.
        coefficients: those of the next update.
    """

    path: Path
    update: int
    streak: int
    coefficients: LossCoefficients


def write_reference(folder: CellFolder, update: int, weights: Mapping[str, Tensor]) -> None:
    """Add a reference policy that moves to the checkpoint that the trainer has just written, before it is whole."""
    file = folder.checkpoint / f"{_PREFIX}{update}" / REFERENCE
    save_file({name: value.contiguous() for name, value in weights.items()}, file)


@torch.no_grad()
def read_reference(state: TrainerState, weights: Mapping[str, Tensor]) -> None:
    """Put the reference policy of a checkpoint into these tensors, by the names that it was written with."""
    stored = load_file(state.path / REFERENCE)
    for name, value in weights.items():
        value.copy_(stored[name])


def complete(folder: CellFolder, update: int, streak: int, coefficients: LossCoefficients) -> None:
    """Mark the checkpoint that the trainer has just written as whole, durably; older ones are deleted."""
    path = folder.checkpoint / f"{_PREFIX}{update}"
    (path / _PICKLED).unlink(missing_ok=True)
    sizes = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            sizes[str(file.relative_to(path))] = file.stat().st_size
    files.share_folder(path)
    files.sync_folder(path)
    record = {
        "schema": SCHEMA,
        "cell": folder.id,
        "update": update,
        "streak": streak,
        "coefficients": asdict(coefficients),
        "files": sizes,
    }
    files.replace(path / MARKER, json.dumps(record).encode())
    for other in _folders(folder):
        if other != path:
            shutil.rmtree(other, ignore_errors=True)


def resume(folder: CellFolder) -> TrainerState | None:
    """The state to go on from, with the records cut back to it; None to start afresh."""
    for path in _folders(folder):
        state = _read(path, folder.id)
        if state is None:
            print(f"{folder.id}: {path.name} is not whole and is left out", file=sys.stderr)
            continue
        if folder.truncate_metrics(state.update) == state.update:
            every = folder.cell().training.evaluate_every
            if folder.truncate_evaluations(state.update) == state.update // every + 1:
                return state
    folder.truncate_metrics(0)
    folder.truncate_evaluations(-1)
    return None


def _folders(folder: CellFolder) -> list[Path]:
    """The checkpoints of a cell, the newest first."""
    found = [path for path in folder.checkpoint.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix(_PREFIX)))


def _read(path: Path, cell: str) -> TrainerState | None:
    """What the marker says; None where it, or one of the files that it names, is not as it was written."""
    try:
        record = json.loads((path / MARKER).read_text())
        whole = all((path / name).stat().st_size == size for name, size in record["files"].items())
        if record["schema"] != SCHEMA or record["cell"] != cell or not whole:
            return None
        return TrainerState(path, record["update"], record["streak"], LossCoefficients(**record["coefficients"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
