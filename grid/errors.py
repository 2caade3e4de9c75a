"""`UserError`: the one exception for what the user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_ABSENT = object()
_LISTED = 24


def nearest(word: Any, allowed: Iterable[str]) -> str | None:
    """The allowed word closest to ``word``, or None when nothing is similar."""
    options = list(allowed)
    folded = {option.lower().replace("-", "_").replace(".", "_"): option for option in options}
    written = str(word).lower().replace("-", "_").replace(" ", "_").replace(".", "_")
    matches = difflib.get_close_matches(written, folded, n=1, cutoff=0.5)
    return folded[matches[0]] if matches else None


class UserError(ValueError):
    """An error in a grid file, an argument or the environment, in one message that says what would be valid.

    Args:
        problem: what is wrong, in one clause.
        file: the file that contains it.
        key: the dotted key, for example ``axes.weight``.
        value: the offending value; shown as written.
        allowed: the valid values or keys; the nearest one is named.
        hint: what to do instead.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: Any = None,
        key: str | None = None,
        value: Any = _ABSENT,
        allowed: Iterable[str] = (),
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = str(file) if file is not None else None
        self.key = key
        self.value = None if value is _ABSENT else value
        self.has_value = value is not _ABSENT
        self.allowed = tuple(str(option) for option in allowed)
        self.hint = hint
        super().__init__(str(self))

    def with_location(self, *, file: Any = None, prefix: str | None = None) -> UserError:
        """The same error with ``prefix`` before its key, and ``file`` where it names none."""
        key = self.key
        if prefix:
            key = f"{prefix}.{key}" if key else prefix
        value = self.value if self.has_value else _ABSENT
        return type(self)(
            self.problem, file=self.file or file, key=key, value=value, allowed=self.allowed, hint=self.hint
        )

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.key) if part)
        text = f"{where}: {self.problem}" if where else self.problem
        if self.has_value:
            shown = repr(self.value).lower() if isinstance(self.value, bool) else repr(self.value)
            text += f" (got {shown if len(shown) <= 200 else shown[:200] + '…'})"
        if self.allowed:
            close = nearest(self.value, self.allowed) if self.has_value else None
            if close is not None and close != self.value:
                text += f"; did you mean {close!r}?"
            shown_options = ", ".join(self.allowed[:_LISTED])
            more = f", … ({len(self.allowed)} in all)" if len(self.allowed) > _LISTED else ""
            text += f" Valid: {shown_options}{more}."
        if self.hint:
            text += f" {self.hint}"
        return text
