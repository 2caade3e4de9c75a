"""`klab archive`: a run's results in one small folder, for reports and reruns without the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klab.harness.cli.arguments import RUNS, JsonOption, RunArgument, RunsOption, run_of
from klab.harness.cli.text import say, show_json

FOLDER = Path("archives")


def archive(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="The archive's folder; default: archives/NAME. An archive is replaced.")
    ] = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Keep a run's results without its weights: cells, evaluations, curves, grid file, settings, versions, costs.

    `klab report`, `klab compare` and `klab rerun` read an archive as they read the run.
    """
    opened = run_of(run, runs)
    from klab.harness.store.archive import Archive
    from klab.reports.archive import left_out_words, write_archive

    folder = out or FOLDER / opened.name
    write_archive(opened, folder)
    made = Archive.open(folder)
    states = made.table("cells")["state"]
    ended = sum(state in ("finished", "diverged", "stopped") for state in states)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if as_json:
        show_json({"archive": str(folder), "bytes": size, "cells": len(states), "ended": ended, **made.left_out})
        return
    say(f"{folder}: {len(states)} cells, {ended} of them ended, {size / 2**10:,.0f} KiB")
    for note in left_out_words([made], [made.name]):
        say(f"note: {note}")
