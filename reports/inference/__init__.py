"""The inference of a study: one model, from which every contrast, interval, p and sentence comes."""

from klab.reports.inference.analysis import Analysis, Best, analyse

__all__ = ["Analysis", "Best", "analyse"]
