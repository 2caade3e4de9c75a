"""One value of an axis, and the axis: what the catalogue's tables are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True)
class Value:
    """One value of an axis.

    Attributes:
        name: what a grid file writes.
        formula: in the symbols of the glossary.
        note: what is worth knowing about it.
        source: citations, by the labels of `klab.grid.sources`.
        parameters: names of the parameters it takes, see `PARAMETERS`.
        needs: what its function asks for beyond the axis's own arguments, by the names of
            `klab.grid.custom_values.VIEW`.
        statistics: how much of an update one token's term depends on: its own ``trajectory``, its ``group``, or the
            whole ``update``.
        group_centred: of an advantage: whether it compares with the trajectory's own group, so that the reward cancels
            in a group of one.
        in_family: of a weight: whether min(ρ, 1) ≤ w ≤ max(ρ, 1) for every ρ and A (the family of Bai & Zhang 2026).
        monotone: of a weight: whether w is non-decreasing in ρ.
        latex: the formula as papers print it, in the notation of `klab.grid.formula`; of a placement or a path the
            equations that it contributes.
        gradient: of what carries a gradient: that gradient in LaTeX.
        estimates: of a divergence other than reverse KL: `latex` and `gradient` of the estimators that differ for it.
    """

    name: str
    formula: str
    note: str = ""
    source: str = ""
    parameters: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    statistics: Literal["trajectory", "group", "update"] = "trajectory"
    group_centred: bool = False
    in_family: bool | None = None
    monotone: bool | None = None
    latex: str = ""
    gradient: str = ""
    estimates: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the objective: its symbol, its default and its values by name."""

    name: str
    symbol: str
    title: str
    default: str
    values: Mapping[str, Value] = field(repr=False)


def axis(name: str, symbol: str, title: str, default: str, *values: Value) -> Axis:
    return Axis(name, symbol, title, default, MappingProxyType({value.name: value for value in values}))
