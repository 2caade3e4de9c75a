"""Text of a run folder as it goes to the page: of bounded length, with the end where that matters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def clipped(value: object, most: int) -> str:
    """The value as text of at most `most` letters; what is left out is said."""
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more letters)"


def ending(text: str | None, most: int) -> str | None:
    """The end of a long text."""
    if text is None or len(text) <= most:
        return text
    return f"({len(text) - most:,} letters before this)…\n{text[-most:]}"


def flat(record: Mapping[str, Any], most: int = 400) -> list[tuple[str, str]]:
    """The entries of nested settings as dotted names and short values, at most so many."""
    found: list[tuple[str, str]] = []
    waiting = [(str(key), value) for key, value in reversed(list(record.items()))]
    while waiting and len(found) < most:
        name, value = waiting.pop()
        if isinstance(value, Mapping) and value:
            waiting += [(f"{name}.{key}", inner) for key, inner in reversed(list(value.items())[:most])]
        else:
            found.append((clipped(name, 200), _shown(value)))
    return found


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return clipped(value, 200)
