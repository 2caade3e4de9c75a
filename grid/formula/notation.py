r"""Printed formulas as trees: a parser of the part of LaTeX that the catalogue is written in.

Commands are letters, relations and functions as LaTeX has them, `\frac`, `\sum`, `\operatorname`, `\mathrm`, `\mathbf`,
`\mathbb`, `\text`, and `cases` with rows ``value & condition``. Scripts are written in braces, the subscript first:
``\pi_{j}^{\mathrm{old}}``. Brackets need no `\left` and `\right`; whoever prints a tree makes them large where needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "Atom",
    "Cases",
    "Fenced",
    "Fraction",
    "Node",
    "Row",
    "Scripts",
    "Word",
    "children",
    "equations",
    "is_tall",
    "parse",
]


@dataclass(frozen=True, slots=True)
class Atom:
    """A letter, a number, a sign, or a command without arguments, as LaTeX writes it."""

    latex: str


@dataclass(frozen=True, slots=True)
class Word:
    """Upright text: ``font`` is operatorname, mathrm, mathbf, mathbb or text."""

    font: str
    text: str


@dataclass(frozen=True, slots=True)
class Scripts:
    """A base with a subscript, a superscript or both; empty where there is none."""

    base: Node
    sub: Row
    sup: Row


@dataclass(frozen=True, slots=True)
class Fraction:
    """A fraction."""

    top: Row
    bottom: Row


@dataclass(frozen=True, slots=True)
class Fenced:
    """What stands between two brackets or bars."""

    left: str
    body: Row
    right: str


@dataclass(frozen=True, slots=True)
class Cases:
    """Values with the conditions under which they hold."""

    rows: tuple[tuple[Row, Row], ...]


Node = Atom | Word | Scripts | Fraction | Fenced | Cases
Row = tuple[Node, ...]

FENCES = {"(": ")", "[": "]", r"\{": r"\}", r"\lvert": r"\rvert"}
_FONTS = (r"\operatorname", r"\mathrm", r"\mathbf", r"\mathbb", r"\text")
_TOKENS = re.compile(r"\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\S")
_SPACES = (r"\,", r"\;", r"\!", r"\:")


def equations(latex: str) -> list[tuple[str, str]]:
    r"""The parts of a formula between ``,\quad``: pairs of left side, empty for an expression, and right side."""
    parts = [part.strip() for part in latex.split(r",\quad")]
    pairs = []
    for part in parts:
        left, sign, right = part.partition(" = ")
        is_definition = bool(sign) and re.fullmatch(r"[\\A-Za-z{}_^+\d]+", left.strip()) is not None
        pairs.append((left.strip(), right.strip()) if is_definition else ("", part))
    return pairs


def parse(latex: str) -> Row:
    """The tree of a formula.

    Raises:
        ValueError: for brackets or braces that do not match, and for a command that is not of this notation.
    """
    reader = _Reader(latex)
    row = reader.row(())
    if reader.token is not None:
        raise ValueError(f"{reader.token!r} closes nothing in {latex}")
    return row


def children(node: Node) -> tuple[Row, ...]:
    """The rows inside a node, in the order in which they are written."""
    match node:
        case Scripts(base, sub, sup):
            return (base,), sub, sup
        case Fraction(top, bottom):
            return top, bottom
        case Fenced(_, body, _):
            return (body,)
        case Cases(rows):
            return tuple(part for row in rows for part in row)
        case _:
            return ()


def is_tall(node: Node) -> bool:
    """Whether brackets around this must grow: around fractions, cases and sums, and around brackets that have grown."""
    if isinstance(node, Fraction | Cases) or (isinstance(node, Scripts) and node.base == Atom(r"\sum")):
        return True
    return isinstance(node, Fenced) and any(is_tall(inner) for part in children(node) for inner in part)


class _Reader:
    """Reads tokens one after the other."""

    def __init__(self, latex: str) -> None:
        self.latex = latex
        self._tokens = [token for token in _TOKENS.findall(latex) if token not in _SPACES]
        self._place = 0

    @property
    def token(self) -> str | None:
        """The next token; None at the end."""
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def next(self, expected: str | None = None) -> str:
        token = self.token
        if token is None or expected not in (None, token):
            raise ValueError(f"expected {expected or 'something'} after token {self._place} of {self.latex}")
        self._place += 1
        return token

    def row(self, ends: tuple[str, ...]) -> Row:
        nodes: list[Node] = []
        while self.token is not None and self.token not in (*ends, "}", ")", "]", r"\}", r"\rvert"):
            nodes.append(self.scripted())
        return tuple(nodes)

    def braced(self) -> Row:
        self.next("{")
        row = self.row(())
        self.next("}")
        return row

    def scripted(self) -> Node:
        base = self.node()
        sub: Row = ()
        sup: Row = ()
        if self.token == "_":
            self.next()
            sub = self.braced()
        if self.token == "^":
            self.next()
            sup = self.braced()
        return Scripts(base, sub, sup) if sub or sup else base

    def node(self) -> Node:
        token = self.next()
        if token in FENCES:
            body = self.row(())
            return Fenced(token, body, self.next(FENCES[token]))
        if token in _FONTS:
            return Word(token[1:], self.text())
        if token == r"\frac":
            return Fraction(self.braced(), self.braced())
        if token == r"\begin":
            return self.cases()
        if token in ("{", "&", r"\\") or (token.startswith("\\") and token not in COMMANDS):
            raise ValueError(f"{token} is not of this notation: {self.latex}")
        return Atom(token)

    def text(self) -> str:
        self.next("{")
        words = []
        while self.token != "}":
            words.append(self.next())
        self.next("}")
        return "".join(words)

    def cases(self) -> Cases:
        self._environment()
        rows = []
        while True:
            value = self.row(("&",))
            self.next("&")
            rows.append((value, self.row((r"\\", r"\end"))))
            if self.next() == r"\end":
                self._environment()
                return Cases(tuple(rows))

    def _environment(self) -> None:
        if self.text() != "cases":
            raise ValueError(f"the only environment is cases: {self.latex}")


COMMANDS = {
    r"\beta": "β", r"\gamma": "γ", r"\delta": "δ", r"\epsilon": "ϵ", r"\varepsilon": "ε", r"\eta": "η",
    r"\kappa": "κ", r"\lambda": "λ", r"\mu": "μ", r"\nu": "ν", r"\xi": "ξ", r"\pi": "π", r"\rho": "ρ",
    r"\sigma": "σ", r"\tau": "τ", r"\varphi": "φ", r"\omega": "ω", r"\alpha": "α", r"\zeta": "ζ", r"\theta": "θ",
    r"\ell": "ℓ", r"\nabla": "∇", r"\sum": "Σ", r"\in": "∈", r"\setminus": "∖", r"\infty": "∞",
    r"\le": "≤", r"\ge": "≥", r"\ne": "≠", r"\land": "and", r"\lor": "or", r"\cdot": "·", r"\sim": "∼",
    r"\log": "log", r"\exp": "exp", r"\min": "min", r"\max": "max",
}  # fmt: skip
"""Commands without arguments, and how plain text writes them."""
