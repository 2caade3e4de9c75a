"""Values of a dataset's rows, and the text that they are in a prompt or an answer.

JSON and CSV have text: a number is what was written, `1` beside `0.5`, `001`, `1e3`, whatever its size. Other formats
have types: an integral number is written without `.0`, a date as ISO 8601 has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any


class WrittenInt(int):
    """An integer of a JSON text, which knows how it was written."""

    written: str

    def __new__(cls, written: str) -> WrittenInt:
        # of thousands of digits Python makes no integer; nobody counts with these
        made = super().__new__(cls, written if len(written) <= 4000 else "0")
        made.written = written
        return made


class WrittenFloat(float):
    """A number of a JSON text with decimals or an exponent, which knows how it was written."""

    written: str

    def __new__(cls, written: str) -> WrittenFloat:
        made = super().__new__(cls, written)
        made.written = written
        return made


def parsed(text: str) -> Any:
    """The value of a JSON text; its numbers know how they were written.

    Raises:
        ValueError: not JSON.
    """
    return json.loads(text, parse_int=WrittenInt, parse_float=WrittenFloat, parse_constant=WrittenFloat)


def short_float(value: float | None, dtype: str) -> float | None:
    """A number of 16 or 32 bits with the shortest text that stands for it: 0.1 rather than 0.10000000149011612."""
    import numpy as np

    if value is None or not math.isfinite(value):
        return value
    return WrittenFloat(str(int(value)) if value.is_integer() else str(np.dtype(dtype).type(value)))


def is_text(value: object) -> bool:
    """Whether a value is text, a number or a date, so that a prompt can be made of it."""
    return isinstance(value, (str, int, float, Decimal, date, time)) and not _is_missing(value)


def text_of(value: object) -> str | None:
    """A value as text; None where there is none (null, NaN of a typed column). Lists and mappings become JSON."""
    if _is_missing(value):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return json_text(value)


def json_text(value: object) -> str:
    """A value as JSON, with numbers as they were written."""
    if isinstance(value, (WrittenInt, WrittenFloat)):
        return value.written
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(float(value))
    if isinstance(value, Decimal):
        return f"{value:.0f}" if value.is_finite() and value == value.to_integral_value() else f"{value:f}"
    if isinstance(value, datetime):
        return value.isoformat(" ")
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(str(key))}: {_inner(each)}" for key, each in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return "[" + ", ".join(_inner(each) for each in value) + "]"
    return _quoted(value) if isinstance(value, str) else str(value)


def _inner(value: object) -> str:
    """Within a list or a mapping, what is no JSON of its own is text in quotes."""
    if isinstance(value, bytes):
        return _quoted(value.decode("utf-8", "replace"))
    return _quoted(json_text(value)) if isinstance(value, (date, time, timedelta)) else json_text(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and not isinstance(value, WrittenFloat) and math.isnan(value))
