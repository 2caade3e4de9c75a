r"""Formulas as LaTeX for a document: brackets as large as what they hold, equations aligned in `align`.

A document needs the packages amsmath and amssymb.
"""

from __future__ import annotations

from collections.abc import Iterable

from klab.grid.formula.notation import Atom, Cases, Fenced, Fraction, Node, Row, Scripts, Word, is_tall, parse
from klab.grid.formula.text import to_text

_WIDTH = 88
"""Letters of a line, as plain text has them, beyond which an equation is broken."""


def to_latex(latex: str) -> str:
    """A formula of the catalogue's notation as LaTeX."""
    return _row(parse(latex))


def align(equations: Iterable[tuple[str, str]]) -> str:
    """Equations, left and right sides, as an `align` environment; long ones are broken between factors or terms."""
    lines = [f"  {to_latex(left)} &= " + " \\\\\n  &\\quad ".join(_lines(right)) for left, right in equations]
    return "\\begin{align}\n" + " \\\\\n".join(lines) + "\n\\end{align}"


def _lines(latex: str) -> list[str]:
    """The lines of a right side."""
    if len(to_text(latex)) <= _WIDTH:
        return [to_latex(latex)]
    row = parse(latex)
    breaks = [place for place, node in enumerate(row) if place and node in (Word("mathbf", "1"), Atom("+"), Atom("-"))]
    if not breaks:
        return [_row(row)]
    middle = min(breaks, key=lambda place: abs(len(_row(row[:place])) - len(_row(row[place:]))))
    return [_row(row[:middle]), _row(row[middle:])]


def _row(row: Row) -> str:
    return " ".join(_node(node) for node in row)


def _node(node: Node) -> str:
    match node:
        case Atom(latex):
            return latex
        case Word(font, text):
            return f"\\{font}{{{text.replace('_', chr(92) + '_')}}}"
        case Fraction(top, bottom):
            return f"\\frac{{{_row(top)}}}{{{_row(bottom)}}}"
        case Fenced(left, body, right):
            tall = any(is_tall(inner) for inner in body)
            if tall:
                return f"\\left{left} {_row(body)} \\right{right}"
            return f"{left} {_row(body)} {right}" if left.startswith("\\") else f"{left}{_row(body)}{right}"
        case Cases(rows):
            lines = " \\\\ ".join(f"{_row(value)} & {_if(condition)}" for value, condition in rows)
            return f"\\begin{{cases}} {lines} \\end{{cases}}"
        case Scripts(base, sub, sup):
            below = f"_{{{_row(sub)}}}" if sub else ""
            return _node(base) + below + (f"^{{{_row(sup)}}}" if sup else "")


def _if(condition: Row) -> str:
    return _row(condition) if condition == (Word("text", "otherwise"),) else rf"\text{{if }} {_row(condition)}"
