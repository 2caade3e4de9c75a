"""`klab export`: a cell's settings for another trainer."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from klab.grid import Objective
from klab.grid.algorithms import algorithm_names, load_algorithm
from klab.grid.yaml_document import dump_yaml
from klab.harness.cli.arguments import RUNS, JsonOption, RunsOption, cell_folder_of
from klab.harness.cli.text import say, show_json
from klab.harness.export import PEERS, Setting


class Peer(StrEnum):
    trl = "trl"
    verl = "verl"
    verl_plugin = "verl-plugin"


def export(
    cell: Annotated[str, typer.Argument(metavar="CELL", help="A named algorithm, or a cell of any run.")],
    to: Annotated[Peer, typer.Option("--to", help="The other trainer; verl-plugin: verl with klab's own loss.")],
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Print the other trainer's configuration for the same algorithm, or say why it has none (exit code 2)."""
    found = PEERS[to.value](_setting(cell, runs))
    if cell in algorithm_names() and (own := load_algorithm(cell).training):
        found = replace(found, differences=(*found.differences, f"its training settings are left out: {own}"))
    if as_json:
        show_json({"target": found.target, "settings": found.settings, "differences": list(found.differences)})
        return
    say(f"# {cell}: {found.target}")
    for difference in found.differences:
        say(f"# differs: {difference}")
    say(dump_yaml(found.settings, sort_keys=True).rstrip("\n"))


def _setting(name: str, runs: Path) -> Setting:
    if name in algorithm_names():
        return Setting(Objective(**load_algorithm(name).objective), name=name)
    folder = cell_folder_of(name, runs, algorithm_names())
    cell = folder.cell()
    return Setting(cell.objective, cell.training, str(folder.path.absolute()))
