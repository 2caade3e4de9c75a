"""`klab axes`: the catalogue in the terminal."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from klab.grid import UserError, catalogue
from klab.harness.cli.arguments import JsonOption
from klab.harness.cli.table import console, show, show_json


def axes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="An axis; all of them by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the axes and values of the objective, with formulas, parameters and sources."""
    if name is not None and name not in catalogue.AXES:
        raise UserError("there is no such axis", key="NAME", value=name, allowed=catalogue.AXES)
    chosen = [catalogue.AXES[name]] if name else list(catalogue.AXES.values())
    if as_json:
        show_json({axis.name: _record(axis) for axis in chosen})
        return
    for axis in chosen:
        rows = [
            (
                value.name + (" *" if value.name == axis.default else ""),
                value.formula,
                ", ".join(value.parameters),
                value.note,
                value.source,
            )
            for value in axis.values.values()
        ]
        show(("value", "formula", "parameters", "note", "source"), rows, f"{axis.name}  {axis.symbol}: {axis.title}")
        console().print()
    used = {parameter for axis in chosen for value in axis.values.values() for parameter in value.parameters}
    rows_of = [
        (each.name, each.default, each.range, each.meaning)
        for each in catalogue.PARAMETERS.values()
        if each.name in used
    ]
    show(("parameter", "default", "range", "meaning"), rows_of, "parameters")
    console().print("* default")


def _record(axis: Any) -> dict[str, Any]:
    return {
        "symbol": axis.symbol,
        "title": axis.title,
        "default": axis.default,
        "values": {value.name: asdict(value) for value in axis.values.values()},
        "parameters": {
            name: {"default": each.default, "range": each.range, "meaning": each.meaning}
            for value in axis.values.values()
            for name in value.parameters
            if (each := catalogue.PARAMETERS[name])
        },
    }
