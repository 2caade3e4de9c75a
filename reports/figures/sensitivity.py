"""Sensitivity of every configuration to what was tuned: score over the tuned values, with what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from klab.reports.figures.style import COLUMN, INK, MUTED, Drawing, canvas, legend_below, look, shortened, styled
from klab.reports.tuned import TunedArm, TunedPart

_NAMED = 8
"""Configurations with a colour of their own; of more, only the baseline has one."""


def sensitivity(part: TunedPart, name: str = "sensitivity") -> Drawing | None:
    """The mean tuning score of every setting, a line per configuration; None where nothing was tried."""
    arms = [arm for arm in part.arms if len(arm.settings) > 1]
    words = list(dict.fromkeys(setting.words for arm in arms for setting in arm.settings))
    if not arms or not any(np.isfinite(setting.mean) for arm in arms for setting in arm.settings):
        return None
    places, scale = _places(part, arms, words)
    many = len(arms) > _NAMED
    with styled():
        named = [arm for arm in arms if not many or arm.baseline]
        figure, (axes,) = canvas(COLUMN, 2.4 + 0.13 * ((len(named) + 1) // 2))
        drawing = Drawing(
            name,
            "Sensitivity to what was tuned",
            f"Mean {part.score} over {len(part.seeds)} tuning seeds of every setting that there was to choose; "
            "small marks are single runs, the ring is what it chose. Of a setting that diverged only the runs that "
            "finished are shown." + (" Black: the baseline." if many else ""),
            "; ".join(f"{arm.label} chose {arm.choice}" for arm in arms[:6]) + ".",
            figure,
        )
        for position, arm in enumerate(arms):
            style: dict[str, Any] = look(position)
            if many:
                style = {"color": INK if arm.baseline else MUTED, "alpha": 1.0 if arm.baseline else 0.45}
            x = [places[setting.words] for setting in arm.settings]
            y = [setting.mean for setting in arm.settings]
            label = shortened(arm.label) if arm in named else None
            axes.plot(x, y, label=label, gid=drawing.tip(f"{arm.label}: chose {arm.choice}"), **style)
            for setting in arm.settings:
                at = [places[setting.words]] * len(setting.scores)
                axes.plot(at, setting.scores, linestyle="", marker="_", markersize=4, color=style["color"], alpha=0.5)
                if setting.chosen:
                    axes.plot(
                        [places[setting.words]],
                        [setting.mean],
                        marker="o",
                        markersize=9,
                        markerfacecolor="none",
                        markeredgecolor=style["color"],
                        linestyle="",
                    )
        axes.set_xscale(scale)
        axes.set_xticks(
            [places[each] for each in words],
            [each.rpartition("=")[2] if len(part.keys) == 1 else each for each in words],
        )
        axes.minorticks_off()
        axes.set_xlabel(", ".join(part.keys))
        axes.set_ylabel(part.score)
        if named:
            legend_below(figure, *axes.get_legend_handles_labels())
    return drawing


def _places(part: TunedPart, arms: Sequence[TunedArm], words: Sequence[str]) -> tuple[dict[str, float], str]:
    """Where each setting stands on the axis: at its value where that is one number, else in the order of the file."""
    values = {setting.words: [*setting.values.values()] for arm in arms for setting in arm.settings}
    numbers = {word: each[0] for word, each in values.items() if len(each) == 1 and _is_number(each[0])}
    if len(numbers) < len(words):
        return {word: float(place) for place, word in enumerate(words)}, "linear"
    wide = min(numbers.values()) > 0 and max(numbers.values()) >= 5 * min(numbers.values())
    return {word: float(value) for word, value in numbers.items()}, "log" if wide else "linear"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
