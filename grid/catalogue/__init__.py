"""The catalogue: every axis of the objective and every value, with formula, parameters and source.

Validation, ``klab axes``, the report's legend and the documentation all read this one table. The symbols are those of
`klab.grid.glossary`, the sources those of `klab.grid.sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from klab.grid.catalogue.credit import ADVANTAGE, AGGREGATION, PATH
from klab.grid.catalogue.divergence import DIVERGENCE, ESTIMATOR, PLACEMENT
from klab.grid.catalogue.importance import RATIO, WEIGHT
from klab.grid.catalogue.value import Axis, Value
from klab.grid.errors import UserError
from klab.grid.parameters import PARAMETERS, Parameter
from klab.grid.user_code import names_user_code

__all__ = ["AXES", "PARAMETERS", "Axis", "Parameter", "Value", "value_of"]

AXES: Mapping[str, Axis] = MappingProxyType(
    {axis.name: axis for axis in (ESTIMATOR, DIVERGENCE, PLACEMENT, RATIO, WEIGHT, ADVANTAGE, AGGREGATION, PATH)}
)
"""The axes of the objective in the order of its composition."""


def value_of(axis: str, name: object) -> Value:
    """The catalogue's entry of an axis value; an import path gives an entry without parameters.

    Raises:
        UserError: for an unknown value, naming the nearest.
    """
    values = AXES[axis].values
    if isinstance(name, str) and name in values:
        return values[name]
    if names_user_code(name):
        return Value(str(name), f"{name}(…)", "custom", str(name))
    raise UserError(f"unknown {AXES[axis].title}", key=axis, value=name, allowed=values)
