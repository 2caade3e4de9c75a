"""Formulas as MathML Core, which browsers draw without a library and without the network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from klab.grid.formula.notation import COMMANDS, Atom, Cases, Fenced, Fraction, Node, Row, Scripts, Word, is_tall, parse

_BARS = {r"\{": "{", r"\}": "}", r"\lvert": "|", r"\rvert": "|"}
_NAMED = (r"\log", r"\exp", r"\min", r"\max")
_LIMITS = (Atom(r"\sum"), Atom(r"\min"), Atom(r"\max"))


def to_mathml(latex: str) -> str:
    """A formula of the catalogue's notation as an inline `math` element."""
    return f"<math>{_row(parse(latex))}</math>"


def aligned(equations: Iterable[tuple[str, str]]) -> str:
    """Equations, left and right sides, as an HTML element of the class `aligned` that holds two `math` elements each.

    Its style sheet is a grid of two columns, the first flush right: MathML Core has no alignment of columns.
    """
    sides = "".join(
        f'<math>{_row(parse(left))}</math><math displaystyle="true"><mo>=</mo>{_row(parse(right))}</math>'
        for left, right in equations
    )
    return f'<div class="aligned">{sides}</div>'


def _row(row: Row) -> str:
    parts = []
    for node, following in zip(row, (*row[1:], None), strict=False):
        parts.append(_node(node))
        if _is_function(node) and following is not None and not isinstance(following, Fenced):
            parts.append('<mspace width="0.17em"/>')
    return "<mrow>" + "".join(parts) + "</mrow>"


def _node(node: Node) -> str:
    match node:
        case Atom(latex):
            return _atom(latex)
        case Word("text", text):
            return f"<mtext>{escape(text)}</mtext>"
        case Word("mathbb", text):
            return f"<mi>{''.join(_DOUBLE.get(letter, letter) for letter in text)}</mi>"
        case Word("mathbf", text):
            return f"<mn>{''.join(_BOLD.get(letter, letter) for letter in text)}</mn>"
        case Word(_, text):
            return f'<mi mathvariant="normal">{escape(text)}</mi>'
        case Fraction(top, bottom):
            return f"<mfrac>{_row(top)}{_row(bottom)}</mfrac>"
        case Fenced(left, body, right):
            stretch = "true" if any(is_tall(inner) for inner in body) else "false"
            before, after = (
                f'<mo form="{form}" fence="true" stretchy="{stretch}">{_BARS.get(bracket, bracket)}</mo>'
                for form, bracket in (("prefix", left), ("postfix", right))
            )
            return f"<mrow>{before}{_row(body)}{after}</mrow>"
        case Cases(rows):
            lines = "".join(f"<mtr><mtd>{_row(value)}</mtd><mtd>{_if(when)}</mtd></mtr>" for value, when in rows)
            return f'<mrow><mo form="prefix">{{</mo><mtable class="cases">{lines}</mtable></mrow>'
        case Scripts(base, sub, sup):
            return _scripts(base, sub, sup)


def _scripts(base: Node, sub: Row, sup: Row) -> str:
    limits = base in _LIMITS or base == Word("operatorname", "argmin")
    name = ("munder" if limits else "msub") if not sup else ("mover" if limits else "msup")
    if sub and sup:
        name = "munderover" if limits else "msubsup"
    inner = "".join(_row(part) for part in (sub, sup) if part)
    return f"<{name}>{_node(base)}{inner}</{name}>"


def _atom(latex: str) -> str:
    text = COMMANDS.get(latex, latex)
    if latex in _NAMED:
        return f'<mi mathvariant="normal">{text}</mi>'
    if latex in (r"\land", r"\lor"):
        return f"<mtext>&#xa0;{text}&#xa0;</mtext>"
    if text[0].isdigit():
        return f"<mn>{text}</mn>"
    if text.isalpha() and text != "∇" and latex != r"\sum":
        return f"<mi>{text}</mi>"
    return f"<mo>{'∑' if latex == chr(92) + 'sum' else '−' if text == '-' else escape(text)}</mo>"


def _if(condition: Row) -> str:
    prefix = "" if condition == (Word("text", "otherwise"),) else "<mtext>if&#xa0;</mtext>"
    return f"<mrow>{prefix}{_row(condition)}</mrow>"


def _is_function(node: Node) -> bool:
    base = node.base if isinstance(node, Scripts) else node
    return isinstance(base, Atom) and base.latex in _NAMED


_DOUBLE = {"E": "𝔼"}
_BOLD = {"1": "𝟏"}
