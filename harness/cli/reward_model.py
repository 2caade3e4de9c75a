"""`klab reward-model`: train the reward models that a grid's proxies need, or find them, and say how good they are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klab.grid import Cell, UserError, user_code
from klab.grid.schema.task import ProxyTask
from klab.harness.cli.arguments import RUNS, GridArgument, JsonOption, RunsOption, grid_of
from klab.harness.cli.table import duration, show
from klab.harness.cli.text import say, show_json

if TYPE_CHECKING:
    from klab.harness.policy.preferences import PreferenceModel


def reward_model(
    grid: GridArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder for starting policies and reward models; default: the run's."
        ),
    ] = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Train every reward model that a grid's cells need and that is not there yet; a launch then finds it.

    Agreement is the share of fresh pairs, of held-out prompts, that a model ranks as the gold reward does; accuracy is
    that share of the pairs it learnt from.
    """
    study = grid_of(grid)
    needed = _needed(study.cells)
    if not needed:
        hint = "A reward model belongs to task: {name: proxy, gold: …}."
        raise UserError("no cell of this grid has a reward model", file=study.file, key="task", hint=hint)
    folder = out or runs / study.name / "policies"
    found: list[tuple[Cell, PreferenceModel, bool]] = []
    with user_code.searching(Path(study.file).parent):
        from klab.harness.training.runtime.torch_settings import configure_torch

        with configure_torch(1):
            for number, cell in enumerate(needed, 1):
                if sys.stderr.isatty():
                    say(f"reward model {number} of {len(needed)}", error=True)
                found.append((cell, *_made(cell, folder)))
    rows = [_row(*each) for each in found]
    if as_json:
        show_json(rows)
        return
    columns = ("reward model", "pairs", "layers", "hidden", "seed", "parameters", "agreement", "accuracy", "took", "")
    show(columns, [_words(row) for row in rows])
    say(f"in {folder}", error=True)


def _needed(cells: tuple[Cell, ...]) -> list[Cell]:
    """One cell for each reward model."""
    first: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        if isinstance(cell.task, ProxyTask):
            first.setdefault((cell.task.of_cell(cell.seed), cell.policy), cell)
    return list(first.values())


def _made(cell: Cell, folder: Path) -> tuple[PreferenceModel, bool]:
    """The reward model of a cell, and whether it was made now."""
    from klab.harness.policy.init.initial_policy import initial_policy
    from klab.harness.policy.preferences import attach_reward_model
    from klab.tasks import load_task

    epochs: list[int] = []
    task = load_task(cell.task)
    start = initial_policy(cell.policy, task, cell.task, folder)
    model = attach_reward_model(
        task, cell.task, cell.policy, start, cell.seed, folder, lambda epoch, _, loss: epochs.append(epoch)
    )
    assert model is not None
    return model, bool(epochs)


def _row(cell: Cell, model: PreferenceModel, new: bool) -> dict[str, Any]:
    assert isinstance(cell.task, ProxyTask)
    return {
        "folder": str(model.folder),
        "pairs": model.pairs,
        "layers": cell.task.layers,
        "hidden": cell.task.hidden,
        "seed": cell.task.of_cell(cell.seed).proxy_seed,
        "parameters": model.parameters,
        "agreement": model.agreement,
        "accuracy": model.accuracy,
        "seconds": model.seconds,
        "new": new,
    }


def _words(row: dict[str, Any]) -> tuple[object, ...]:
    agreement = "–" if row["agreement"] is None else f"{row['agreement']:.3f}"
    return (
        Path(row["folder"]).name,
        *(row[name] for name in ("pairs", "layers", "hidden", "seed", "parameters")),
        agreement,
        f"{row['accuracy']:.3f}",
        duration(row["seconds"]),
        "" if row["new"] else "found",
    )
