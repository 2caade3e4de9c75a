"""`klab formula`: loss and gradient of an algorithm, a cell or a grid's configurations, for a terminal or a paper."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from klab.grid import Objective
from klab.grid.algorithms import algorithm_names, load_algorithm
from klab.grid.formula import Formula, align, ascii_only, cell_formula, to_text
from klab.grid.formula import formula as formula_of
from klab.grid.schema.training import TrainingSection
from klab.harness.cli.arguments import RUNS, STUDIES, JsonOption, RunsOption, cell_folder_of, grid_of
from klab.harness.cli.text import say, show_json

Item = TypeVar("Item")


@dataclass(frozen=True)
class Titled:
    """A formula and what it is the formula of."""

    title: str
    formula: Formula


def formula(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="An algorithm, a grid file or ready study, or a cell of any run.")
    ],
    latex: Annotated[
        bool, typer.Option("--latex", help="Print LaTeX: an align environment (amsmath, amssymb).")
    ] = False,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Print the loss and its gradient with every symbol explained, and the nearest named algorithm with what differs.

    Settings without effect do not appear. Of a grid every configuration is printed, equal formulas once.
    """
    found = _found(name, runs)
    if as_json:
        show_json([_record(each) for each in found])
        return
    said: set[object] = set()
    for place, each in enumerate(found):
        if place:
            say()
        for line in _latex(each) if latex else _text(each, said):
            say(line)


def _found(name: str, runs: Path) -> list[Titled]:
    if name in algorithm_names():
        algorithm = load_algorithm(name)
        training = _training(algorithm.training)
        made = formula_of(Objective(**algorithm.objective), training=training)
        return [Titled(f"{algorithm.title}, {algorithm.source}", made)]
    if Path(name).suffix in (".yaml", ".yml") or (STUDIES / f"{name}.yaml").exists():
        return _of_grid(name)
    cell = cell_folder_of(name, runs, algorithm_names()).cell()
    return [Titled(f"cell {cell.id}", cell_formula(cell))]


def _training(settings: dict[str, Any]) -> TrainingSection:
    """A schedule off the policy, under which ratios act, with an algorithm's own settings."""
    return TrainingSection(**({"updates_per_rollout": 2} | settings))


def _of_grid(name: str) -> list[Titled]:
    """The formulas of a grid's configurations; those with one formula are one."""
    grid = grid_of(name)
    found: dict[object, Titled] = {}
    for cell in {cell.group: cell for cell in reversed(grid.cells)}.values():
        words = "baseline" if cell.group == grid.baseline else " = ".join(cell.spellings) or cell.group
        made = cell_formula(cell)
        key = (made.equations, made.symbols)
        found[key] = Titled(f"{words}; {found[key].title}" if key in found else words, made)
    return list(reversed(found.values()))


def _text(each: Titled, said: set[object]) -> Iterator[str]:
    """Title, equations, symbols, remarks and the nearest algorithm for a terminal, without what was said before."""
    width = max(shutil.get_terminal_size((120, 24)).columns, 60)
    yield each.title
    yield ""
    yield from _columns([(to_text(left), f"= {to_text(right)}") for left, right in each.formula.pairs], width)
    yield ""
    yield from _columns(
        [
            (symbol.text if symbol.value is None else f"{symbol.text} = {_number(symbol.value)}", f" {symbol.meaning}")
            for symbol in _new(each.formula.symbols, said)
        ],
        width,
    )
    yield ""
    for remark in _new(each.formula.remarks, said):
        yield from _hung("- ", _letters(remark), width)
    yield from _hung("", _letters(each.formula.nearest.sentence), width)


def _new(items: Iterable[Item], said: set[object]) -> Iterator[Item]:
    """The items that were not said before."""
    for item in items:
        if item not in said:
            said.add(item)
            yield item


def _columns(rows: list[tuple[str, str]], width: int) -> Iterator[str]:
    """Two columns, of which the second is wrapped."""
    rows = [(_letters(left), _letters(right)) for left, right in rows]
    margin = max((len(left) for left, _ in rows), default=0)
    for left, right in rows:
        yield from _hung(f"  {left:<{margin}} ", right, width)


def _hung(head: str, text: str, width: int) -> Iterator[str]:
    """A text behind a head, its further lines indented."""
    yield from textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [head]


def _latex(each: Titled) -> Iterator[str]:
    """An `align` environment, and the rest as comments."""
    yield f"% {_letters(each.title)}"
    yield from align(each.formula.pairs).splitlines()
    for symbol in each.formula.symbols:
        value = "" if symbol.value is None else f" = {_number(symbol.value)}"
        yield _letters(f"% {symbol.latex}{value}: {symbol.meaning}")
    for remark in (*each.formula.remarks, each.formula.nearest.sentence):
        yield _letters(f"% {remark}")


def _record(each: Titled) -> dict[str, Any]:
    made = each.formula
    return {
        "title": each.title,
        "latex": align(made.pairs),
        "equations": [{"left": to_text(left), "right": to_text(right)} for left, right in made.pairs],
        "symbols": [{"latex": s.latex, "text": s.text, "meaning": s.meaning, "value": s.value} for s in made.symbols],
        "remarks": list(made.remarks),
        "nearest": made.nearest.algorithm.name,
        "differences": list(made.nearest.differences),
    }


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _letters(text: str) -> str:
    """The text in letters that the terminal's encoding has."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ascii_only(text)
    return text
