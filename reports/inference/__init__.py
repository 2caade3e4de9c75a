"""The inference of a study: one model, from which every contrast, interval, p and sentence comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klab.reports.inference.analysis import DELTA, Analysis, Best, analyse
    from klab.reports.inference.design import counted_scores
    from klab.reports.inference.error_rate import ALPHA
    from klab.reports.inference.family import DIFFERS, EQUIVALENT, UNDECIDED

_HOMES = {
    "ALPHA": "error_rate",
    "DELTA": "analysis",
    "DIFFERS": "family",
    "EQUIVALENT": "family",
    "UNDECIDED": "family",
    "Analysis": "analysis",
    "Best": "analysis",
    "analyse": "analysis",
    "counted_scores": "design",
}

__all__ = [
    "ALPHA",
    "DELTA",
    "DIFFERS",
    "EQUIVALENT",
    "UNDECIDED",
    "Analysis",
    "Best",
    "analyse",
    "counted_scores",
]


def __getattr__(name: str) -> Any:
    # `klab plan` asks for the power of a design only, which needs no pandas.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
