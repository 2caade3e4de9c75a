"""Numbers in sentences and tables: three digits, a true minus sign, a dash where there is nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MARK = "†"
"""Stands behind a verdict that depends on what stopped runs would have reached (`reports.censored`)."""


def number(value: float, digits: int = 3) -> str:
    """A score for a sentence; a dash where there is none."""
    return f"{value:.{digits}f}".replace("-", "−") if np.isfinite(value) else "–"


def signed(value: float, digits: int = 3) -> str:
    """A difference for a sentence, with its sign; a dash where there is none."""
    return f"{value:+.{digits}f}".replace("-", "−") if np.isfinite(value) else "–"


def mean_span(mean: float, low: float, high: float) -> str:
    """A mean with its interval where it has one."""
    return number(mean) + (f" [{number(low)}, {number(high)}]" if np.isfinite(low) else "")


def difference_span(difference: float, low: float, high: float) -> str:
    """A difference with its interval where it has one."""
    return signed(difference) + (f" [{signed(low)}, {signed(high)}]" if np.isfinite(low) else "")


def p_words(p: float) -> str:
    """A p for a sentence. It never reads as 0.050 on the wrong side of the threshold."""
    if not np.isfinite(p):
        return "no test possible"
    return "p < 0.001" if p < 0.001 else f"p = {p_number(p)}"


def p_number(p: float) -> str:
    """A p for a table; a dash where there is none."""
    if not np.isfinite(p):
        return "–"
    if p < 0.001:
        return "<0.001"
    shown = f"{p:.3f}"
    return "0.049" if p < 0.05 <= float(shown) else shown


def verdict_words(record: Mapping[str, Any]) -> str:
    """The verdict of a row of a summary, marked where it depends on stopped runs; empty for the baseline."""
    return f"{record['verdict']} {MARK}" if record["depends"] and record["verdict"] else str(record["verdict"])


def joined(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
