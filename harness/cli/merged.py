"""Merging cells that are the same algorithm, with a progress bar, for `klab plan` and `klab launch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from klab.grid import Grid
from klab.harness.cli.table import console
from klab.harness.dispatch.merging import MergedGrid, merge_equivalent
from klab.harness.store import Run

AT_ONCE = 200
"""How many objectives `klab plan` compares without being asked: some seconds, once per machine."""

MergeOption = Annotated[
    bool, typer.Option("--merge/--no-merge", help="Run cells that are the same algorithm once, or all of them.")
]


def merged_grid(study: Grid, folder: Path, *, at_most: int | None = None, quiet: bool = False) -> MergedGrid:
    """The study with equal algorithms merged; cells that the run in ``folder`` already has stay."""
    keep = Run.open(folder).cells if (folder / "manifest.json").exists() else []
    with Progress(
        TextColumn("comparing gradients"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console(),
        transient=True,
        disable=quiet,
    ) as progress:
        bar = progress.add_task("", total=None, visible=False)

        def tell(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total, visible=True)

        return merge_equivalent(study, keep=keep, at_most=at_most, progress=tell)
