"""`klab crosscheck`: cells for a few updates on klab's own engine and on TRL, from the same rollouts."""

from __future__ import annotations

import math
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.grid import user_code
from klab.harness.cli.arguments import GridArgument, JsonOption, grid_of
from klab.harness.cli.table import show
from klab.harness.cli.text import say, show_json

if TYPE_CHECKING:
    from klab.harness.engines.trl.crosscheck import Difference

TOLERANCES = {"float64": 1e-5, "float32": 1e-3}
"""Largest relative difference of the gradients that counts as rounding: transformers normalises in float32 whatever the
precision, and torch adds 1e-6 to the norm by which it clips."""


class Precision(StrEnum):
    float32 = "float32"
    float64 = "float64"


def crosscheck(
    grid: GridArgument,
    cells: Annotated[
        list[str] | None, typer.Argument(metavar="[CELL…]", help="Cells by any part of their id; default: the first.")
    ] = None,
    updates: Annotated[int, typer.Option(min=1, help="Updates on both engines.")] = 3,
    dtype: Annotated[Precision, typer.Option(help="Precision of both.")] = Precision.float64,
    as_json: JsonOption = False,
) -> None:
    """Compare gradients, losses and weights of both engines; exit code 1 where they differ by more than rounding."""
    study = grid_of(grid)
    chosen = [study.cell(name) for name in cells] if cells else [study.cells[0]]
    with user_code.searching(Path(study.file).parent):
        from klab.harness.engines.trl.settings import require_trl

        require_trl()
        from klab.harness.engines.trl.crosscheck import crosscheck as compare
        from klab.harness.training.runtime.torch_settings import configure_torch

        with configure_torch(1):
            found = {cell.id: compare(cell, updates, dtype.value) for cell in chosen}
    same = all(_is_rounding(each.gradient, dtype) for each in (each for listed in found.values() for each in listed))
    if as_json:
        rows = {name: [asdict(each) for each in listed] for name, listed in found.items()}
        show_json({"dtype": dtype.value, "same": same, "cells": rows})
    else:
        columns = ("cell", "update", "loss klab", "loss TRL", "gradient", "weights")
        lines = [
            (name, each.update, *(f"{loss:.6g}" for loss in (each.loss_klab, each.loss_trl)), *_short(each))
            for name, listed in found.items()
            for each in listed
        ]
        show(columns, lines, "Relative differences of klab's own engine and TRL, from the same rollouts")
        limit = TOLERANCES[dtype.value]
        say(f"the engines {'agree up to rounding' if same else 'differ'} (gradients within {limit:g}: {dtype.value})")
    if not same:
        raise typer.Exit(1)


def _short(found: Difference) -> tuple[str, str]:
    return f"{found.gradient:.1e}", f"{found.weights:.1e}"


def _is_rounding(difference: float, dtype: Precision) -> bool:
    return math.isfinite(difference) and difference <= TOLERANCES[dtype.value]
