"""Every value of the catalogue carries its formula in LaTeX, in the notation that klab prints, with known symbols."""

from __future__ import annotations

import pytest

from klab.grid.catalogue import AXES, PARAMETERS, Value
from klab.grid.formula.notation import Atom, Fraction, Scripts, Word, equations, parse
from klab.grid.formula.symbols import SYMBOLS, names

VALUES = [(axis.name, value) for axis in AXES.values() for value in axis.values.values()]
every_value = pytest.mark.parametrize(("axis", "value"), VALUES, ids=[f"{axis}-{value.name}" for axis, value in VALUES])
WITH_GRADIENT = ("estimator", "placement", "ratio", "path")
LEFT_SIDES = {"placement": {"r_{j}", "u_{j}", "A_{j}", "K_{j}", "s_{j}"}, "path": {"s_{j}"}}
"""What the equations of an axis may define; those of the others define symbols of their own beside an expression."""


@every_value
def test_every_value_has_latex_in_this_notation(axis: str, value: Value) -> None:
    parts = equations(value.latex)
    assert value.latex, "the field latex is empty"
    for left, right in parts:
        parse(left)
        assert parse(right), f"an empty formula in {value.latex}"
    defined = [left for left, _ in parts]
    if axis in LEFT_SIDES:
        assert set(defined) <= LEFT_SIDES[axis]
    else:
        assert defined[0] == ""
        assert "" not in defined[1:]


@every_value
def test_what_carries_a_gradient_says_it(axis: str, value: Value) -> None:
    assert bool(value.gradient) == (axis in WITH_GRADIENT)
    for _, right in equations(value.gradient):
        parse(right)


@every_value
def test_every_symbol_is_explained_by_the_glossary_by_a_parameter_or_by_the_value(axis: str, value: Value) -> None:
    defined = {left for text in (value.latex, value.gradient) for left, _ in equations(text)}
    own = {PARAMETERS[name].latex for name in value.parameters}
    bound = {"y"}  # of the set in a maximum
    estimates = [text for pair in value.estimates.values() for text in pair]
    for text in filter(None, (value.latex, value.gradient, *estimates)):
        for side in (part for equation in equations(text) for part in equation if part):
            unknown = set(names(side, own | defined)) - set(SYMBOLS) - own - defined - bound
            assert not unknown, f"{unknown} in {side}"


@every_value
def test_every_number_that_a_value_takes_appears_in_its_formula(axis: str, value: Value) -> None:
    numbers = {PARAMETERS[name].latex for name in value.parameters if not PARAMETERS[name].choices}
    used = {name for _, right in equations(value.latex) for name in names(right, numbers)}
    assert numbers <= used


def test_every_number_has_a_symbol_and_no_two_of_one_value_the_same() -> None:
    assert all(bool(each.latex) != bool(each.choices) for each in PARAMETERS.values())
    for _, value in VALUES:
        symbols = [PARAMETERS[name].latex for name in value.parameters if not PARAMETERS[name].choices]
        assert len(set(symbols)) == len(symbols)


def test_a_formula_is_read_as_a_tree() -> None:
    assert parse(r"\frac{1}{H} \kappa_{j}^{2}") == (
        Fraction((Atom("1"),), (Atom("H"),)),
        Scripts(Atom(r"\kappa"), (Atom("j"),), (Atom("2"),)),
    )
    assert parse(r"\operatorname{clip}") == (Word("operatorname", "clip"),)
    assert equations(r"p_{j} q,\quad p_{j} = 1 - x") == [("", "p_{j} q"), ("p_{j}", "1 - x")]
    assert equations(r"\mathbf{1}[j = H]") == [("", r"\mathbf{1}[j = H]")]


@pytest.mark.parametrize(
    "latex", [r"\frac{1}", "(a", "a)", "{a", r"\foo", r"\begin{align} a & b \end{align}", r"a \\ b"]
)
def test_what_is_not_of_the_notation_is_an_error(latex: str) -> None:
    with pytest.raises(ValueError, match=r"notation|expected|closes|environment"):
        parse(latex)


def test_symbols_are_named_without_the_indices_of_tokens() -> None:
    assert names(r"\rho_{j}^{q} \pi_{i}^{\mathrm{old}} V_{i+1} r_{1}", ["q"]) == [
        r"\rho", "j", "q", r"\pi^{\mathrm{old}}", "i", "V", "r_{1}",
    ]  # fmt: skip
