"""Labels of points that cover no point, no error bar and no other label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from klab.reports.figures.style import INK, MUTED, RULE, shortened

Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""

_SIZE = 6.0
_CHARACTER = 0.56
"""Width of a character of DejaVu Sans over its size."""
_DIRECTIONS = ((1, 0), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7), (0, 1), (0, -1))


def label_points(
    figure: Figure,
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    names: Sequence[str],
    *,
    first: Sequence[int] = (),
    only: Sequence[int] | None = None,
    bars: Sequence[tuple[float, float, float, float]] = (),
) -> list[int]:
    """Writes the names beside their points where there is room, further away with a thin line to the point.

    Args:
        first: positions of points that are labelled before the others, in ink.
        only: positions of the points to label; None: all.
        bars: (x0, y0, x1, y1) of straight lines to keep clear, in data.

    Returns:
        Positions of the points that have a label now.
    """
    figure.draw_without_rendering()  # the layout decides where the axes are
    figure.set_layout_engine("none")
    to_pixels = axes.transData.transform
    inside = axes.get_window_extent()
    point = figure.dpi / 72
    height = 1.25 * _SIZE * point
    at = to_pixels(list(zip(x, y, strict=True)))
    taken: list[Box] = [(px - 3 * point, py - 3 * point, px + 3 * point, py + 3 * point) for px, py in at]
    for x0, y0, x1, y1 in bars:
        (left, bottom), (right, top) = to_pixels([(x0, y0), (x1, y1)])
        taken.append(
            (min(left, right) - point, min(bottom, top) - point, max(left, right) + point, max(bottom, top) + point)
        )
    wanted = range(len(names)) if only is None else only
    done = []
    for i in dict.fromkeys([*first, *wanted]):
        text = shortened(names[i], 26)
        box = _free(at[i], len(text) * _CHARACTER * _SIZE * point, height, point, taken, inside)
        if box is None:
            continue
        taken.append(box)
        done.append(i)
        place = axes.transData.inverted().transform(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        color = INK if i in first else MUTED
        axes.text(*place, text, ha="center", va="center", fontsize=_SIZE, color=color)
        near = (min(max(at[i][0], box[0]), box[2]), min(max(at[i][1], box[1]), box[3]))
        if abs(near[0] - at[i][0]) + abs(near[1] - at[i][1]) > 9 * point:
            end = axes.transData.inverted().transform(near)
            axes.plot([x[i], end[0]], [y[i], end[1]], color=RULE, linewidth=0.7, zorder=1)
    return done


def _free(at: Any, width: float, height: float, point: float, taken: list[Box], inside: Any) -> Box | None:
    for distance in (5, 10, 16, 24, 34):
        for dx, dy in _DIRECTIONS:
            x = at[0] + dx * (distance * point + width / 2)
            y = at[1] + dy * (distance * point + height / 2)
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            within = box[0] > inside.x0 and box[2] < inside.x1 and box[1] > inside.y0 and box[3] < inside.y1
            if within and not any(_overlap(box, other) for other in taken):
                return box
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
