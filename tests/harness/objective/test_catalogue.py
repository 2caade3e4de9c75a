"""The functions behind the axes are exactly those that the catalogue lists, with its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from klab.grid import Objective, UserError
from klab.grid.catalogue import AXES
from klab.harness.objective import axis_functions
from klab.harness.objective.advantage import ADVANTAGES
from klab.harness.objective.aggregate import AGGREGATIONS
from klab.harness.objective.divergence import DIVERGENCES
from klab.harness.objective.functions import PATHS
from klab.harness.objective.kl import ESTIMATORS
from klab.harness.objective.placement import PLACEMENTS
from klab.harness.objective.ratio import RATIOS
from klab.harness.objective.registry import Registry
from klab.harness.objective.values import PENALTIES, SOLVERS, WEIGHTS

REGISTRIES = (ESTIMATORS, DIVERGENCES, PLACEMENTS, RATIOS, WEIGHTS, ADVANTAGES, AGGREGATIONS, PATHS)


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.axis)
def test_every_axis_has_the_values_and_parameters_of_the_catalogue(registry: Registry) -> None:
    values = AXES[registry.axis].values
    assert set(registry) == set(values)
    for name, function in registry.items():
        keywords = _keywords(SOLVERS.get(name, function))
        if registry is WEIGHTS and name in PENALTIES:
            keywords |= _keywords(PENALTIES[name]) - (_keywords(function) - set(values[name].parameters))
        assert sorted(keywords) == sorted((*values[name].parameters, *values[name].needs)), name


def _keywords(function: Callable[..., Any]) -> set[str]:
    taken = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in taken if parameter.kind is parameter.KEYWORD_ONLY}


def test_an_unknown_value_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'group_norm'"):
        ADVANTAGES.bound("grup_norm", {})


def test_an_objective_is_composed_once() -> None:
    assert axis_functions(Objective(beta=0.3)) is axis_functions(Objective(beta=0.3))
    assert axis_functions(Objective(beta=0.3)) is not axis_functions(Objective(beta=0.4))
