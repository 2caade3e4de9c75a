"""What the axes and their values mean, from the catalogue, with what this study found about each."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from klab.grid.catalogue import AXES, PARAMETERS
from klab.reports.axes import VariedAxis
from klab.reports.comparison import Comparison
from klab.reports.effects import AxisEffect, Level
from klab.reports.findings import p_words, signed
from klab.reports.study import Study


@dataclass(frozen=True)
class ValueLegend:
    """One value of an axis: its formula and source (empty outside the catalogue) and its effect (None when not
    estimated).
    """

    value: str
    formula: str
    note: str
    source: str
    reference: bool
    level: Level | None


@dataclass(frozen=True)
class AxisLegend:
    """One varied axis: its values in the order used everywhere, and one sentence on what it did."""

    axis: VariedAxis
    symbol: str
    position: int
    effect: AxisEffect | None
    sentence: str
    values: list[ValueLegend]


_SUPERSCRIPT = re.compile(r"\^(?:\{([^}]*)\}|(\w))")
_SUBSCRIPT = re.compile(r"(?<![A-Za-z_])((?:mean|std|log π|[A-Za-zℓ∇\u0370-\u03ff]))_(?:\{([^}]*)\}|([A-Za-z]+|≥))")


def formula(text: str) -> Markup:
    """A formula of the catalogue with its indices set as such."""
    marked = _SUPERSCRIPT.sub(lambda found: f"<sup>{found[1] or found[2]}</sup>", str(escape(text)))
    return Markup(_SUBSCRIPT.sub(lambda found: f"{found[1]}<sub>{found[2] or found[3]}</sub>", marked))


def legend(study: Study, comparison: Comparison) -> list[AxisLegend]:
    """The varied axes, those with the largest effect first."""
    effects = {effect.axis: effect for effect in comparison.effects}
    order = {key: i for i, key in enumerate(effects)}
    found = [_axis(axis, position, effects.get(axis.key)) for position, axis in enumerate(study.axes)]
    return sorted(found, key=lambda entry: order.get(entry.axis.key, len(order)))


def _axis(axis: VariedAxis, position: int, effect: AxisEffect | None) -> AxisLegend:
    levels = {level.value: level for level in effect.levels} if effect else {}
    known = AXES[axis.key].values if axis.key in AXES else {}
    values = []
    for value in axis.values:
        entry = known.get(value.partition("(")[0])
        level = levels.get(value)
        reference = effect is not None and value == effect.reference
        values.append(
            ValueLegend(
                value,
                entry.formula if entry else "",
                entry.note if entry else "",
                entry.source if entry else "",
                reference,
                level if level is not None and np.isfinite(level.estimate) else None,
            )
        )
    symbol = (
        AXES[axis.key].symbol if axis.key in AXES else PARAMETERS[axis.key].meaning if axis.key in PARAMETERS else ""
    )
    return AxisLegend(axis, symbol, position, effect, _sentence(effect), values)


def _sentence(effect: AxisEffect | None) -> str:
    if effect is None:
        return "Only one of its values has a score so far."
    if effect.confounded:
        return f"Changes together with {', '.join(effect.confounded)}; its effect cannot be separated from theirs."
    moved = [level for level in effect.levels if level.low > 0 or level.high < 0]
    parts = [f"{level.value} {signed(level.estimate)} [{signed(level.low)}, {signed(level.high)}]" for level in moved]
    found = "; ".join(parts) if parts else "no value differs from it beyond seed noise"
    return f"Against {effect.reference}: {found}. Whole axis: {p_words(effect.p_holm)} (Holm)."
