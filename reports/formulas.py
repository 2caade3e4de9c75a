"""Loss and gradient of configurations as the page prints them: MathML, symbols, numbers and the nearest algorithm."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from klab.grid import Cell
from klab.grid.formula import align, aligned, cell_formula, to_mathml
from klab.reports.comparison import Comparison
from klab.reports.study import Study

MOST = 100
"""Configurations of a task up to which each prints its equations; beyond them only the baseline does."""


@dataclass(frozen=True)
class PrintedFormula:
    """The formula of one configuration; texts are untrusted, markup is escaped.

    Attributes:
        equations: a displayed `math` element.
        symbols: symbol, number or nothing, and meaning.
        remarks: what the equations do not show.
        nearest: a sentence on the nearest named algorithm.
        latex: an `align` environment.
    """

    equations: Markup
    symbols: list[tuple[Markup, str, str]]
    remarks: tuple[str, ...]
    nearest: str
    latex: str


def printed(cell: Cell) -> PrintedFormula:
    """The formula of a configuration."""
    made = cell_formula(cell)
    symbols = [
        (Markup(to_mathml(each.latex)), "" if each.value is None else f"= {each.value:g}", each.meaning)
        for each in made.symbols
        if each.latex
    ]
    return PrintedFormula(Markup(aligned(made.pairs)), symbols, made.remarks, made.nearest.sentence, align(made.pairs))


def of_cell(cell: Cell, configurations: int) -> PrintedFormula | None:
    """What a configuration's own page prints; None where there are too many of them."""
    return printed(cell) if configurations <= MOST else None


def of_baselines(study: Study, comparisons: list[Comparison]) -> list[tuple[str, PrintedFormula]]:
    """The formula of each task's baseline, or first configuration, with the name of the task; equal ones once."""
    found: dict[str, tuple[str, PrintedFormula]] = {}
    for comparison in comparisons:
        made = printed(study.configurations[comparison.baseline or comparison.groups[0]])
        tasks = f"{found[made.latex][0]}, {comparison.task}" if made.latex in found else comparison.task
        found[made.latex] = (tasks, made)
    return list(found.values())


def sentence(study: Study, comparison: Comparison) -> str:
    """A sentence for the methods paragraph: which published algorithm the baseline is, or what differs from it."""
    group = comparison.baseline or comparison.groups[0]
    nearest = cell_formula(study.configurations[group]).nearest
    who = f"{nearest.algorithm.title} ({nearest.algorithm.source})"
    name = "The baseline" if comparison.baseline else "The first configuration"
    if not nearest.differences:
        return f"{name} is {who}. "
    return f"{name} is {who} with {'; '.join(nearest.differences)}. "
