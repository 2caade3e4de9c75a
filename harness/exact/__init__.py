"""The exact lab: policies small enough to enumerate, and what a cell's gradient really is on them.

Names are resolved on first use, so that `klab.harness.exact.equivalence` can be imported without torch.
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
