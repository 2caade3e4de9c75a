"""Plain text and JSON on the terminal: data cannot command it, and it need not know every letter."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""C0 and C1 control characters but tab and line feed: what a terminal may take for commands."""


def printable(text: str) -> str:
    r"""The text with control characters written out, as `\x1b`."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def say(text: str = "", *, error: bool = False) -> None:
    """Print a line of plain text, which may hold data, to standard output or standard error."""
    print(printable(text), file=sys.stderr if error else sys.stdout)


def show_json(value: object) -> None:
    """Print a value as strict JSON: what is not a finite number becomes null, and no control character stays."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf16", "utf32")
    text = json.dumps(plain(value), indent=2, ensure_ascii=not unicode, allow_nan=False)
    print(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def plain(value: object) -> Any:
    """The value with NaN and infinities replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def tolerate_any_encoding() -> None:
    """Write out the letters that the terminal's encoding lacks, instead of ending with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
