"""`klab axes`: the catalogue of the objective's axes, its symbols and its sources, in the terminal."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from klab.grid import UserError, catalogue
from klab.grid.custom_values import SIGNATURES, SOLVER, Signature
from klab.grid.glossary import GLOSSARY
from klab.grid.parameters import TERMS
from klab.grid.sources import SOURCES
from klab.harness.cli.arguments import JsonOption
from klab.harness.cli.table import console, show
from klab.harness.cli.text import show_json


def axes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="An axis; all of them by default.")] = None,
    symbols: Annotated[bool, typer.Option("--symbols", help="The symbols of the formulas instead.")] = False,
    sources: Annotated[bool, typer.Option("--sources", help="The literature that is cited instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the axes and values of the objective, with formulas, parameters and sources.

    With NAME also how a function of your own on that axis is called, with an example.
    """
    if sum((name is not None, symbols, sources)) > 1:
        raise UserError("choose one of NAME, --symbols and --sources")
    if name is not None and name not in catalogue.AXES:
        raise UserError("there is no such axis", key="NAME", value=name, allowed=catalogue.AXES)
    if symbols:
        _show_rows(("symbol", "code", "shape", "meaning"), [asdict(symbol) for symbol in GLOSSARY], as_json)
        return
    if sources:
        rows = [asdict(source) for source in SOURCES.values()]
        _show_rows(("label", "authors", "year", "title", "where"), rows, as_json)
        return
    chosen = [catalogue.AXES[name]] if name else list(catalogue.AXES.values())
    if as_json:
        show_json({axis.name: _record(axis) for axis in chosen})
        return
    for axis in chosen:
        _show_axis(axis)
    used = {parameter for axis in chosen for value in axis.values.values() for parameter in value.parameters}
    used |= set() if name else set(TERMS)
    rows_of = [
        (each.name, each.default, each.range, each.meaning)
        for each in catalogue.PARAMETERS.values()
        if each.name in used
    ]
    show(("parameter", "default", "range", "meaning"), rows_of, "parameters")
    console().print("* default")
    if name:
        _show_signature(name, SIGNATURES[name])
        if name == "weight":
            console().print(
                "\n[bold]a weight whose parameters depend on the whole update[/] has an attribute `solver`:"
            )
            _show_signature("solver", SOLVER)
    else:
        console().print("`klab axes NAME` shows how to write a value of your own; --symbols and --sources explain.")


def _show_rows(columns: tuple[str, ...], rows: list[dict[str, str]], as_json: bool) -> None:
    if as_json:
        show_json(rows)
    else:
        show(columns, [[row[column] for column in columns] for row in rows])


def _show_axis(axis: catalogue.Axis) -> None:
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


def _show_signature(axis: str, signature: Signature) -> None:
    screen = console()
    screen.print(f"\n[bold]a value of your own[/]: a function that is called as\n\n    {signature.call(axis)}\n")
    rows = [(name, meaning) for name, meaning in signature.inputs.items()]
    rows += [(f"{name} (if the function has such a parameter)", text) for name, text in signature.optional.items()]
    show(("input", "what it is"), rows)
    screen.print("\nFor example, in mine.py:\n")
    screen.print("\n".join(f"    {line}".rstrip() for line in signature.example.splitlines()), markup=False)
    screen.print(f"\nand in the grid file:\n\n    {signature.written}", markup=False)


def _record(axis: catalogue.Axis) -> dict[str, Any]:
    signature = SIGNATURES[axis.name]
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
        "custom": {
            "call": signature.call(axis.name),
            "inputs": dict(signature.inputs),
            "optional": dict(signature.optional),
            "returns": signature.returns,
            "example": signature.example,
            "written": signature.written,
        },
    }
