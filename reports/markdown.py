"""Pieces of a Markdown document. Texts may be anybody's: they stay texts, whatever is in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_LINKS = ("](", "]:", "][", "![")
_EMPHASIS = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
"""Underscores but for those within a word, which are nothing but underscores in Markdown."""
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_BEGINNINGS = tuple("#-+=~:>")


def plain(text: str) -> str:
    """A text as Markdown that shows it as it is, on one line. Brackets of intervals stay readable."""
    text = " ".join(text.split())
    letters = "\\|`*" + ("[]" if any(mark in text for mark in _LINKS) else "")
    for letter in letters:
        text = text.replace(letter, "\\" + letter)
    return _EMPHASIS.sub(r"\\_", _TAG.sub(r"\\<", text))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> list[str]:
    """The lines of a table and an empty one; no lines where it has no rows.

    Args:
        numbers: how many columns at the end are numbers, which stand at the right.
    """
    lines = ["| " + " | ".join(map(plain, row)) + " |" for row in rows]
    if not lines:
        return []
    marks = ["---"] * (len(heads) - numbers) + ["---:"] * numbers
    return ["| " + " | ".join(map(plain, heads)) + " |", "|" + "|".join(marks) + "|", *lines, ""]


def paragraph(*sentences: str) -> list[str]:
    """The lines of a paragraph and an empty one; no lines where all sentences are empty."""
    text = " ".join(plain(each) for each in sentences if each)
    if text.startswith(_BEGINNINGS):
        text = "\\" + text
    return [text, ""] if text else []


def bullets(items: Iterable[str]) -> list[str]:
    """The lines of a list and an empty one; no lines where it is empty. Items are Markdown."""
    lines = [f"- {item}" for item in items]
    return [*lines, ""] if lines else []


def code(lines: Iterable[str]) -> list[str]:
    """Commands for a shell, and an empty line."""
    return ["```sh", *(line.replace("`", "") for line in lines), "```", ""]
