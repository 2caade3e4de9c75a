"""The exact lab: what a cell's gradient estimator is, measured on policies small enough to enumerate.

Names are imported on first use, so that `klab.harness.exact.equivalence` can be used without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from klab.harness.exact.equivalence import equivalence_classes
    from klab.harness.exact.gradients import exact_entropy, exact_gradient, exact_kl, expected_reward, gradient_of
    from klab.harness.exact.report import EstimatorReport, estimator_report
    from klab.harness.exact.tabular import TabularPolicy

_HOMES = {
    "TabularPolicy": "tabular",
    "EstimatorReport": "report",
    "equivalence_classes": "equivalence",
    "estimator_report": "report",
    "exact_entropy": "gradients",
    "exact_gradient": "gradients",
    "exact_kl": "gradients",
    "expected_reward": "gradients",
    "gradient_of": "gradients",
}

__all__ = [
    "EstimatorReport",
    "TabularPolicy",
    "equivalence_classes",
    "estimator_report",
    "exact_entropy",
    "exact_gradient",
    "exact_kl",
    "expected_reward",
    "gradient_of",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
