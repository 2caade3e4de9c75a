"""The formula of an objective with everything that a reader needs beside its equations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from klab.grid.catalogue import AXES, PARAMETERS, value_of
from klab.grid.cell import Cell
from klab.grid.formula.compose import Composition, Equation, compose
from klab.grid.formula.custom import function_name
from klab.grid.formula.nearest import Nearest, nearest
from klab.grid.formula.symbols import explained, names
from klab.grid.formula.text import to_text
from klab.grid.formula.training import numbers, remarks
from klab.grid.glossary import Symbol
from klab.grid.objective import Objective
from klab.grid.schema.training import TrainingSection
from klab.grid.user_code import names_user_code


@dataclass(frozen=True, slots=True)
class Explanation:
    """One symbol of a formula.

    Attributes:
        latex: how it is printed.
        text: the same for a terminal.
        meaning: what it is.
        value: of a number that the configuration sets; None of others.
    """

    latex: str
    text: str
    meaning: str
    value: Any = None


@dataclass(frozen=True, slots=True)
class Formula:
    """Loss and gradient of an objective, ready to be printed.

    Attributes:
        equations: in the catalogue's notation.
        symbols: the numbers of the configuration, then the others in the order of the glossary.
        remarks: choices that the symbols do not show, settings without effect, and what training adds.
        nearest: the nearest named algorithm.
    """

    equations: tuple[Equation, ...]
    symbols: tuple[Explanation, ...]
    remarks: tuple[str, ...]
    nearest: Nearest

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Left and right sides."""
        return [(equation.left, equation.right) for equation in self.equations]


def formula(objective: Objective, on_policy: bool = False, training: TrainingSection | None = None) -> Formula:
    """The formula of an objective.

    Args:
        objective: the point on the axes.
        on_policy: whether every ratio is 1; as `training` says where that is given.
        training: settings that add to the loss; None: those of the objective alone.
    """
    on_policy = on_policy if training is None else training.on_policy
    made = compose(objective, on_policy, training)
    return Formula(
        made.equations,
        tuple(_explanations(objective, made, training)),
        tuple(_remarks(objective, made, on_policy, training)),
        nearest(objective, on_policy, training),
    )


@lru_cache(maxsize=4096)
def cell_formula(cell: Cell) -> Formula:
    """The formula of a cell, under its training schedule."""
    return formula(cell.objective, training=cell.training)


def _explanations(objective: Objective, made: Composition, training: TrainingSection | None) -> Iterator[Explanation]:
    settings = numbers(training)
    kept = {*made.parameters, *settings, *made.own}
    sides = [side for equation in made.equations for side in (equation.left, equation.right)]
    used = list(dict.fromkeys(name for side in sides for name in names(side, kept)))
    for latex, (name, value) in made.parameters.items():
        if latex in used:
            yield Explanation(latex, to_text(latex), PARAMETERS[name].meaning, value)
    for latex, (value, meaning) in settings.items():
        if latex in used and latex not in made.parameters:
            yield Explanation(latex, to_text(latex), meaning, value)
    functions = _functions(objective, made)
    for name, meaning in functions.items():
        if name in used:
            yield Explanation(rf"\operatorname{{{name}}}", name, meaning)
    for symbol in explained(name for name in used if name not in {*kept, *functions}):
        yield Explanation(_printed(symbol), symbol.symbol, symbol.meaning)


def _printed(symbol: Symbol) -> str:
    """The names of a glossary's entry as a formula."""
    special = {"1[]": r"\mathbf{1}[\cdot]", "E": r"\mathbb{E}"}
    words = (rf"\operatorname{{{name}}}" if name.isalpha() and len(name) > 1 else name for name in symbol.latex)
    return ", ".join(special.get(word, word) for word in words)


def _functions(objective: Objective, made: Composition) -> dict[str, str]:
    """The user's own functions by the names under which they are printed."""
    found = {}
    for axis in AXES:
        path = made.active.get(axis, "")
        if names_user_code(path):
            given = ", ".join(f"{key} = {value}" for key, value in objective.arguments(axis).items())
            found[function_name(path)] = f"your {AXES[axis].title} {path}" + (f" with {given}" if given else "")
    return found


def _remarks(
    objective: Objective, made: Composition, on_policy: bool, training: TrainingSection | None
) -> Iterator[str]:
    for axis in AXES:
        name = made.active.get(axis)
        note = "" if name is None or names_user_code(name) else value_of(axis, name).note
        if note and not note.startswith("gradient"):  # which is printed
            yield f"{axis} {name}: {note}"
    for key, value in made.active.items():
        parameter = PARAMETERS.get(key.partition(".")[2])
        if parameter is not None and parameter.choices:
            yield f"{parameter.name} is {value}: {parameter.meaning}"
    if names_user_code(made.active["aggregation"]):
        yield "the gradient is that of an aggregation that is linear in its terms"
    idle: dict[str, list[str]] = {}
    for setting, reason in objective.canonical_form(on_policy).idle.items():
        idle.setdefault(reason, []).append(setting)
    for reason, found in idle.items():
        yield f"without effect: {', '.join(found)} ({reason})"
    yield from remarks(training)
