"""The inference of a study: one model, from which every contrast, interval, p and sentence comes."""

from klab.reports.inference.analysis import DELTA, Analysis, Best, analyse
from klab.reports.inference.design import counted_scores
from klab.reports.inference.family import ALPHA, DIFFERS, EQUIVALENT, UNDECIDED

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
