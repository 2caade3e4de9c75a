"""The symbols that a printed formula uses, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable

from klab.grid.formula.notation import COMMANDS, Atom, Fenced, Node, Row, Scripts, Word, children, parse
from klab.grid.glossary import GLOSSARY, Symbol

_INDEX = re.compile(r"(?:[jinmvk1](?:\+1)?,?)+")
"""A subscript that says which token or trajectory is meant."""
_LETTERS = frozenset(command for command, text in COMMANDS.items() if len(text) == 1 and text not in "Σ∈∖∞≤≥≠·∼")
_UNNAMED = ("e",)
"""Letters that need no explanation."""

SYMBOLS = {name: symbol for symbol in GLOSSARY for name in symbol.latex}
"""The glossary by printed name."""


def names(latex: str, known: Iterable[str] = ()) -> list[str]:
    """The symbols of a formula in the order of their first appearance, without indices of tokens and trajectories.

    Args:
        known: names that keep their index, such as ``G_{j}``, beside those of the glossary.
    """
    kept = {*SYMBOLS, *known}
    found: dict[str, None] = {}
    _collect(parse(latex), kept, found)
    return list(found)


def source(row: Row) -> str:
    """A tree of letters, numbers and words as LaTeX, without spaces."""
    parts = []
    for node in row:
        match node:
            case Atom(latex):
                parts.append(latex)
            case Word(font, text):
                parts.append(f"\\{font}{{{text}}}")
            case Scripts(base, sub, sup):
                scripts = ((sign, row) for sign, row in (("_", sub), ("^", sup)) if row)
                parts.append(source((base,)) + "".join(f"{sign}{{{source(row)}}}" for sign, row in scripts))
            case _:
                raise ValueError(f"no name: {node}")
    return "".join(parts)


def explained(symbols: Iterable[str]) -> list[Symbol]:
    """The glossary's entries of these names, each once, in the order of the glossary."""
    wanted = {SYMBOLS[name].symbol for name in symbols if name in SYMBOLS}
    return [symbol for symbol in GLOSSARY if symbol.symbol in wanted]


def _collect(row: Row, kept: set[str], found: dict[str, None]) -> None:
    for node, following in zip(row, (*row[1:], None), strict=False):
        if node == Word("mathbf", "1") and isinstance(following, Fenced):
            found.setdefault("1[]")
        elif isinstance(node, Scripts) and _is_symbol(node.base):
            name, rest = _scripted(node, kept)
            if name not in _UNNAMED:
                found.setdefault(name)
            for part in rest:
                _collect(part, kept, found)
        elif _is_symbol(node):
            if _bare(node) not in _UNNAMED:
                found.setdefault(_bare(node))
        else:
            for part in children(node):
                _collect(part, kept, found)


def _scripted(node: Scripts, kept: set[str]) -> tuple[str, tuple[Row, ...]]:
    """The name of a symbol with scripts, and the scripts that are formulas of their own."""
    labelled = bool(node.sup) and isinstance(node.sup[0], Word)
    label = f"^{{{source(node.sup)}}}" if labelled and isinstance(node.base, Atom) else ""
    powers = () if labelled else (node.sup,)
    plain = _bare(node.base) + label
    try:
        index = source(node.sub)
    except ValueError:
        return plain, (node.sub, *powers)
    full = f"{_bare(node.base)}_{{{index}}}{label}"
    if full in kept or (index and isinstance(node.base, Atom) and not _INDEX.fullmatch(index)):
        return full, powers
    return plain, (node.sub, *powers)


def _is_symbol(node: Node) -> bool:
    if isinstance(node, Word):
        return node.font in ("operatorname", "mathbb")
    return isinstance(node, Atom) and (node.latex in _LETTERS or (len(node.latex) == 1 and node.latex.isalpha()))


def _bare(node: Node) -> str:
    return node.text if isinstance(node, Word) else source((node,))
