"""Digests of what a cell measured, by which a repetition is compared with it bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

TIMING = "seconds"
"""Entries whose names begin so are no part of a digest."""


def digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of rows of metrics or evaluations, with every bit of their numbers and without timings."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(_untimed(row), sort_keys=True, separators=(",", ":")).encode())
        found.update(b"\n")
    return found.hexdigest()


def _untimed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _untimed(each) for key, each in value.items() if not str(key).startswith(TIMING)}
    return [_untimed(each) for each in value] if isinstance(value, list) else value
