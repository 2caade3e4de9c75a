"""`klab pretrain`: the policy that a grid's cells start from, made now and kept as a model of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.grid import UserError, user_code
from klab.harness.cli.arguments import GridArgument, JsonOption, grid_of
from klab.harness.cli.text import say, show_json

if TYPE_CHECKING:
    from klab.grid import Cell, Grid


def pretrain(
    grid: GridArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the model goes.")],
    as_json: JsonOption = False,
) -> None:
    """Train the tiny or small policy that a grid's cells start from, without the cells, and write it as a Hugging Face
    checkpoint with its tokenizer: `policy: {name: hf, model: FOLDER}`. A folder that has it is left as it is."""
    study = grid_of(grid)
    cell = _cell(study)
    with user_code.searching(Path(study.file).parent):
        from klab.harness.policy.init.initial_policy import policy_in_folder
        from klab.harness.training.runtime.torch_settings import configure_torch
        from klab.tasks.task import load_task

        with configure_torch(1):
            made = policy_in_folder(out, cell.policy, load_task(cell.task), cell.task, _tell)
    if as_json:
        show_json({"model": str(out), **made.record, "made": made.new})
        return
    about = f"{made.record['updates']} updates, held-out accuracy {made.record['accuracy']:.3f}"
    say(f"{out}: {about}{'' if made.new else '; it was there'}")


def _cell(study: Grid) -> Cell:
    """A cell with the grid's only starting policy."""
    starts = {(cell.policy, cell.task): cell for cell in study.cells}
    for policy, _ in starts:
        if policy.name == "hf":
            raise UserError(
                "is a model already: only tiny and small policies are trained here",
                file=study.file,
                key="policy.name",
                value="hf",
            )
    if len(starts) > 1:
        raise UserError(
            f"its cells start from {len(starts)} policies, and one is made",
            file=study.file,
            key="axes",
            hint="Write a grid file without the axes of policy and task.",
        )
    return next(iter(starts.values()))


def _tell(update: int, at_most: int, accuracy: float) -> None:
    print(f"{update} of at most {at_most} updates, held-out accuracy {accuracy:.3f}", file=sys.stderr, flush=True)
