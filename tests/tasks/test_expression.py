"""The expression parser agrees with arithmetic, and refuses everything else without harm."""

from __future__ import annotations

import ast
import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klab.tasks.expression import Malformed, evaluate

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def oracle(node: ast.expr) -> int:
    """The value by Python's own grammar, walked without evaluating code."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](oracle(node.left), oracle(node.right))
    assert isinstance(node, ast.Constant)
    assert isinstance(node.value, int)
    return node.value


expressions = st.recursive(
    st.integers(0, 999).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map("".join), inner.map(lambda text: f"({text})")
    ),
    max_leaves=12,
)


@given(expressions)
def test_values_agree_with_pythons_grammar(text: str) -> None:
    value, numbers = evaluate(text)
    assert value == oracle(ast.parse(text, mode="eval").body)
    separated = "".join(c if c.isdigit() else " " for c in text)
    assert numbers == [int(word) for word in separated.split()]


@given(st.text(alphabet="0123456789+-*() ,a=_.", max_size=40))
def test_anything_else_is_refused(text: str) -> None:
    try:
        value, _ = evaluate(text)
    except Malformed:
        return
    tree = ast.parse("".join(f" {int(w)} " if w.isdigit() else w for w in _words(text)).strip(), mode="eval")
    assert value == oracle(tree.body)


def _words(text: str) -> list[str]:
    """The text cut into runs of digits and single characters; leading zeros are legal here but not in Python."""
    words: list[str] = []
    for character in text:
        if character.isdigit() and words and words[-1].isdigit():
            words[-1] += character
        else:
            words.append(character)
    return words


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "1+",
        "-1",
        "(1",
        "1)",
        "()",
        "1 + 2",
        "2**3",
        "1/2",
        "²",
        "٣",
        "1" * 10,
        "(" * 40 + "1" + ")" * 40,
        "1+" * 200,
    ],
)
def test_malformed_texts(text: str) -> None:
    with pytest.raises(Malformed):
        evaluate(text)


def test_depth_and_length_limits_admit_what_they_say() -> None:
    assert evaluate("(" * 32 + "7" + ")" * 32) == (7, [7])
    assert evaluate("+".join(["1"] * 128))[0] == 128
