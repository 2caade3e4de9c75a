"""Formulas as plain text: Unicode, or ASCII for terminals that have nothing else."""

from __future__ import annotations

from klab.grid.formula.notation import COMMANDS, Atom, Cases, Fenced, Fraction, Node, Row, Scripts, Word, parse

_SPACED = frozenset("+-=<>≤≥≠∈∖∼:")
_FUNCTIONS = (r"\log", r"\exp", r"\min", r"\max", r"\sigma")
_SUPERSCRIPTS = {"2": "²", "3": "³"}
_BARS = {r"\{": "{", r"\}": "}", r"\lvert": "|", r"\rvert": "|"}

ASCII = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "eps", "ϵ": "epsilon", "ζ": "zeta", "η": "eta",
    "θ": "theta", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma",
    "τ": "tau", "φ": "phi", "ω": "omega", "ℓ": "logp", "Σ": "sum", "∇": "grad ", "−": "-", "·": "*", "≤": "<=",
    "≥": ">=", "≠": "!=", "∈": "in", "∖": "without", "∼": "~", "²": "^2", "³": "^3", "√": "sqrt", "←": "<-",
    "×": "x", "…": "...", "‖": "||", "∞": "inf", "R̂": "R_hat", "→": "->", "₊": "_+",
}  # fmt: skip
"""How the letters of formulas are written where there is only ASCII."""


def to_text(latex: str) -> str:
    """A formula of the catalogue's notation as a line of Unicode."""
    return _row(parse(latex))


def ascii_only(text: str) -> str:
    """The same text in ASCII; what has no spelling becomes a question mark."""
    for letter, word in ASCII.items():
        text = text.replace(letter, word)
    return text.encode("ascii", "replace").decode()


def _row(row: Row) -> str:
    parts: list[str] = []
    for place, node in enumerate(row):
        before = row[place - 1] if place else None
        written = _node(node)
        if isinstance(node, Fraction) and _factor(before, row[place + 1 : place + 2]):
            written = f"({written})"
        unary = before == Atom("-") and (place == 1 or _is_sign(row[place - 2]))
        parts.append(_gap(before, node, unary) + written)
    return "".join(parts)


def _factor(before: Node | None, after: Row) -> bool:
    """Whether a node is multiplied with a neighbour."""
    return any(node is not None and not _is_sign(node) for node in (before, *after))


def _gap(before: Node | None, node: Node, unary: bool) -> str:
    """What stands between two nodes, of which the first may be a unary minus."""
    if before is None:
        return ""
    sign, previous = _sign(node), _sign(before)
    if sign in (",", "/", "·") or previous in ("/", "·"):
        return ""
    if previous == ",":
        return " "
    if unary:
        return ""
    if sign or previous or _is_sum(before) or _is_sum(node):
        return " "
    if before == Atom(r"\nabla") or _is_argument(node):
        return ""
    if _is_function(before):
        return "" if isinstance(node, Fenced | Fraction) else " "
    return "·"


def _sign(node: Node) -> str:
    """A sign between two terms or factors; empty for what is none."""
    if not isinstance(node, Atom):
        return ""
    text = COMMANDS.get(node.latex, node.latex)
    return text if text in _SPACED or text in (",", "/", "·", "and", "or") else ""


def _is_sign(node: Node) -> bool:
    return bool(_sign(node))


def _is_sum(node: Node) -> bool:
    return node == Atom(r"\sum") or (isinstance(node, Scripts) and node.base == Atom(r"\sum"))


def _is_function(node: Node) -> bool:
    base = node.base if isinstance(node, Scripts) else node
    if isinstance(base, Word):
        return base.font in ("operatorname", "mathbf", "mathbb")
    return isinstance(base, Atom) and base.latex in _FUNCTIONS


def _is_argument(node: Node) -> bool:
    """Whether this is the (v) of π_j(v)."""
    base = node.base if isinstance(node, Scripts) else node
    return isinstance(base, Fenced) and base.body == (Atom("v"),)


def _node(node: Node) -> str:
    match node:
        case Atom("-"):
            return "−"
        case Atom(latex):
            return COMMANDS.get(latex, latex)
        case Word(_, text):
            return text
        case Fraction(top, bottom):
            return f"{_operand(top)}/{_operand(bottom)}"
        case Fenced(left, body, right):
            return f"{_BARS.get(left, left)}{_row(body)}{_BARS.get(right, right)}"
        case Cases(rows):
            cases = "; ".join(f"{_row(value)} {_condition(condition)}" for value, condition in rows)
            return "{" + cases + "}"
        case Scripts(base, sub, sup):
            return _scripts(base, sub, sup)


def _condition(condition: Row) -> str:
    text = _row(condition)
    return text if text == "otherwise" else f"if {text}"


def _operand(row: Row) -> str:
    """The top or the bottom of a fraction."""
    simple = len(row) == 1 and not isinstance(row[0], Fraction)
    called = len(row) == 2 and _is_function(row[0]) and isinstance(row[1], Fenced)
    indexed = len(row) == 2 and _is_argument(row[1])
    return _row(row) if simple or called or indexed else f"({_row(row)})"


def _scripts(base: Node, sub: Row, sup: Row) -> str:
    label = sup[0].text if sup and isinstance(sup[0], Word) else ""
    index = _row(sub).replace(" ", "")
    below = ",".join(filter(None, (label, index)))
    short = len(below) == 1 or below.replace(",", "").isalnum()
    text = _node(base) + (f"_{below}" if short and below else f"_{{{below}}}" if below else "")
    if not sup or label:
        return text
    power = _row(sup)
    return text + _SUPERSCRIPTS.get(power, f"^{power}" if len(power) == 1 else f"^{{{power}}}")
