"""What the axes and their values mean, from the catalogue, with what this study found about each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from klab.grid.catalogue import AXES, PARAMETERS
from klab.reports.axes import VariedAxis
from klab.reports.comparison import Comparison
from klab.reports.findings import AxisFinding, axis_findings
from klab.reports.frame import records
from klab.reports.study import Study
from klab.reports.words import difference_span, p_words


@dataclass(frozen=True)
class ValueLegend:
    """One value of an axis: its formula and source (empty outside the catalogue), and its row of the analysis' levels
    (None when not estimated).
    """

    value: str
    formula: str
    note: str
    source: str
    reference: bool
    level: dict[str, Any] | None


@dataclass(frozen=True)
class AxisLegend:
    """One varied axis: its values in the order used everywhere, and one sentence on what it did."""

    axis: VariedAxis
    symbol: str
    position: int
    effect: AxisFinding | None
    sentence: str
    values: list[ValueLegend]


_SUPERSCRIPT = re.compile(r"\^(?:\{([^}]*)\}|(\w))")
_SUBSCRIPT = re.compile(r"(?<![A-Za-z_])((?:mean|std|log π|[A-Za-zℓ∇\u0370-\u03ff]))_(?:\{([^}]*)\}|([A-Za-z]+|≥))")


def formula(text: str) -> Markup:
    """A formula of the catalogue with its indices set as such."""
    marked = _SUPERSCRIPT.sub(lambda found: f"<sup>{found[1] or found[2]}</sup>", str(escape(text)))
    return Markup(_SUBSCRIPT.sub(lambda found: f"{found[1]}<sub>{found[2] or found[3]}</sub>", marked))


def legend(study: Study, comparison: Comparison) -> list[AxisLegend]:
    """The varied axes, in the order of the findings."""
    found = {finding.axis: finding for finding in axis_findings(study, comparison)}
    order = {key: i for i, key in enumerate(found)}
    levels: dict[str, dict[str, dict[str, Any]]] = {}
    for row in records(comparison.analysis.levels):
        levels.setdefault(row["axis"], {})[str(row["value"])] = row
    base = study.values[comparison.baseline] if comparison.baseline else {}
    entries = [
        _axis(axis, position, found.get(axis.key), levels.get(axis.key, {}), base.get(axis.key))
        for position, axis in enumerate(study.axes)
    ]
    return sorted(entries, key=lambda entry: order.get(entry.axis.key, len(order)))


def _axis(
    axis: VariedAxis,
    position: int,
    effect: AxisFinding | None,
    levels: dict[str, dict[str, Any]],
    reference: str | None,
) -> AxisLegend:
    known = AXES[axis.key].values if axis.key in AXES else {}
    values = []
    for value in axis.values:
        entry = known.get(value.partition("(")[0])
        level = levels.get(value)
        values.append(
            ValueLegend(
                value,
                entry.formula if entry else "",
                entry.note if entry else "",
                entry.source if entry else "",
                value == reference,
                level if level is not None and np.isfinite(level["difference"]) else None,
            )
        )
    symbol = (
        AXES[axis.key].symbol if axis.key in AXES else PARAMETERS[axis.key].meaning if axis.key in PARAMETERS else ""
    )
    return AxisLegend(axis, symbol, position, effect, _sentence(effect, levels, reference), values)


def _sentence(effect: AxisFinding | None, levels: dict[str, dict[str, Any]], reference: str | None) -> str:
    if effect is None:
        return "Only one of its values has a score so far."
    if not levels or reference is None:
        return f"{effect.words[0].upper()}{effect.words[1:]}."
    parts = [
        f"{value} {difference_span(row['difference'], row['low'], row['high'])}, {p_words(row['p'])}, {row['verdict']}"
        for value, row in levels.items()
        if np.isfinite(row["p"])
    ]
    return f"Against {reference}: {'; '.join(parts)}." if parts else f"Against {reference} nothing can be inferred."
