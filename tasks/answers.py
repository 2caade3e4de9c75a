r"""Final answers: where a solution marks its answer, and whether two of them are the same number.

Marks are GSM8K's `#### n` and the `\boxed{…}` of MATH; the last one of a text counts.
"""

from __future__ import annotations

import re
from decimal import Decimal

_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_STATED = re.compile(r"\**\s*([$€£]?[+-]?[\d,]*\.?\d+)(?:\s+[A-Za-z ]+)?\**\.?")
_BOXED = re.compile(r"\\f?boxed\s*\{")
_NUMBER = re.compile(r"[$€£]?\s*([+-]?)\s*(\d+|\d{1,3}(?:,\d{3})+)?(\.\d+)?\s*\.?")
LONGEST_NUMBER, LONGEST_STATED = 40, 100


def final_answer(text: str) -> str | None:
    r"""The text of the last `#### …` or `\boxed{…}`; None without one, or where it is empty or not closed.

    Of `#### 18 dollars` or `#### **18**` the number is taken.

    >>> final_answer("6 * 7 = 42\n#### 42")
    '42'
    """
    marks = [(match.start(), _stated(match.group(1).strip())) for match in _HASHES.finditer(text)]
    marks += [(match.start(), _braced(text, match.end())) for match in _BOXED.finditer(text)]
    if not marks:
        return None
    return max(marks)[1].strip() or None


def number(text: str) -> Decimal | None:
    """The value of a plain number such as `-1,234.50` or `$12`; None for anything else.

    >>> number("1,234") == number("1234.0")
    True
    """
    match = _NUMBER.fullmatch(text.strip()) if len(text) <= LONGEST_NUMBER else None
    if match is None or not (match.group(2) or match.group(3)):
        return None
    sign, whole, fraction = match.groups(default="")
    return Decimal(f"{sign}{whole.replace(',', '') or '0'}{fraction}")


def _stated(line: str) -> str:
    match = _STATED.fullmatch(line) if len(line) <= LONGEST_STATED else None
    return match.group(1) if match else line


def _braced(text: str, start: int) -> str:
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[start:at]
    return ""
