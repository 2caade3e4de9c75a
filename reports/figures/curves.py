"""What happened during training: for one axis or some cells, every quantity over updates, tokens or samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import FuncFormatter

from klab.reports.axes import VariedAxis
from klab.reports.comparison import Comparison
from klab.reports.figures.effort import UPDATES, efforts, label_effort, positions
from klab.reports.figures.series import Cube, Curve, RunStates, cube, mean_curve, representatives, run_states, smoothed
from klab.reports.figures.style import Drawing, legend_below, legend_columns, look, panel_grid, shortened, styled
from klab.reports.statistics import Array
from klab.reports.study import Study

MOST_VALUES = 10
_POINTS = 80


class Quantity(NamedTuple):
    """A quantity of a frame; its values are never below `low` nor above `high`, None: the range is that of what was
    seen.
    """

    frame: str
    column: str
    title: str
    low: float | None
    high: float | None


QUANTITIES = (
    Quantity("evaluations", "reward", "held-out reward", None, None),
    Quantity("evaluations", "reverse_kl", "KL to reference, nats", 0.0, None),
    Quantity("evaluations", "accuracy", "greedy accuracy", 0.0, 1.0),
    Quantity("metrics", "reward_mean", "training reward", None, None),
    Quantity("metrics", "clip_fraction", "clip fraction", 0.0, 1.0),
    Quantity("metrics", "entropy", "entropy, nats per token", 0.0, None),
    Quantity("metrics", "gradient_norm", "gradient norm", 0.0, None),
    Quantity("evaluations", "length", "length, tokens", 0.0, None),
)


@dataclass(frozen=True)
class TrainingCurves:
    """All that the curves of a task are made of; quantities that no run has are left out."""

    cubes: dict[str, Cube]
    ranges: dict[str, tuple[float, float]]
    states: RunStates
    efforts: dict[str, Cube]
    window: int

    def mean(self, column: str, groups: list[int]) -> Curve | None:
        """The curve of some groups, its band cut at the quantity's range; at most some 80 points."""
        curve = mean_curve(self.cubes[column], self.states, groups)
        if curve is None:
            return None
        points = curve.updates.size
        some = np.unique(np.linspace(0, points - 1, min(points, _POINTS)).round().astype(int))
        lowest, highest = self.ranges[column]
        low, high = (np.clip(end[some], lowest, highest) for end in (curve.low, curve.high))
        return curve._replace(updates=curve.updates[some], mean=curve.mean[some], low=low, high=high)

    def at(self, curve: Curve, unit: str) -> Array:
        return positions(curve, self.efforts.get(unit), self.states)


def training_curves(study: Study, comparison: Comparison) -> TrainingCurves:
    """Metrics are moving averages over a twentieth of the updates, evaluations are as measured."""
    cubes, ranges, window = {}, {}, 1
    for quantity in QUANTITIES:
        frame = getattr(study, quantity.frame)
        data = cube(study, comparison, frame, quantity.column)
        seen = data.values[np.isfinite(data.values)]
        if not seen.size:
            continue
        if quantity.frame == "metrics":
            window = max(data.updates.size // 20, 1) | 1
            data = Cube(data.updates, smoothed(data.values, window))
        cubes[quantity.column] = data
        ranges[quantity.column] = _range(quantity, float(seen.min()), float(seen.max()))
    return TrainingCurves(cubes, ranges, run_states(study, comparison), efforts(study, comparison), window)


def _range(quantity: Quantity, least: float, most: float) -> tuple[float, float]:
    """Bounds of a quantity. Rewards within [0, 1] are taken to be bounded by these."""
    if quantity.low is None:
        return min(least, 0.0), max(most, 1.0) if least >= 0 else most
    return min(quantity.low, least), max(quantity.high, most) if quantity.high is not None else np.inf


def axis_curves(
    study: Study,
    comparison: Comparison,
    axis: VariedAxis,
    position: int,
    data: TrainingCurves,
    units: Sequence[str] = (UPDATES,),
) -> list[Drawing]:
    """The panels of `axis`, once per unit of effort; none when fewer than two of its values can be shown."""
    shown = representatives(study, comparison, axis)[:MOST_VALUES]
    if len(shown) < 2 or not data.cubes:
        return []
    lines = [(value, axis.values.index(value), groups) for value, groups in shown]
    words = (
        "Each line averages all cells with the value"
        if any(len(groups) > 1 for _, _, groups in lines)
        else "Each line is the baseline with only this axis changed"
    )
    return [_draw(f"curves-{position}", f"Training by {axis.title}", words, lines, data, unit) for unit in units]


def cell_curves(
    study: Study, comparison: Comparison, data: TrainingCurves, units: Sequence[str] = (UPDATES,)
) -> list[Drawing]:
    """The best cells, the baseline and the worst, for studies without a varied axis or as an overview."""
    order = [comparison.groups.index(group) for group in comparison.table["group"] if group in comparison.groups]
    chosen = list(dict.fromkeys(order if len(order) <= 6 else [*order[:4], order[-1]]))
    if comparison.baseline and (base := comparison.groups.index(comparison.baseline)) not in chosen:
        chosen.append(base)
    if not chosen or not data.cubes:
        return []
    lines = [(study.labels[comparison.groups[i]], k, [i]) for k, i in enumerate(chosen)]
    words = "The best cells, the worst, and the baseline" if len(order) > 6 else "All cells"
    return [_draw("curves-cells", "Training of cells", words, lines, data, unit) for unit in units]


def _draw(
    name: str, title: str, words: str, lines: list[tuple[str, int, list[int]]], data: TrainingCurves, unit: str
) -> Drawing:
    titles = {quantity.column: quantity.title for quantity in QUANTITIES}
    columns = list(data.cubes)
    with styled():
        beside = legend_columns([f"{label} (n = {len(groups)})" for label, _, groups in lines])
        figure, panels = panel_grid(len(columns), 1.05, 0.42 + 0.13 * -(-len(lines) // beside))
        drawing = Drawing(
            name if unit == UPDATES else f"{name}-{unit}",
            title,
            "",
            f"{title}: " + ", ".join(label for label, _, _ in lines) + ".",
            figure,
            view=unit,
        )
        handles: dict[str, tuple[Any, int]] = {}
        held = 0
        for axes, column in zip(panels, columns, strict=False):
            axes.set_title(titles[column], fontsize=6.5, fontweight="normal")
            for label, position, groups in lines:
                if (curve := data.mean(column, groups)) is None:
                    continue
                handle = _line(axes, curve, data.at(curve, unit), look(position))
                handle.set_gid(
                    drawing.tip(
                        f"{label}: {titles[column]} {curve.mean[-1]:.3g} after {curve.updates[-1]} "
                        f"updates, n = {curve.runs} runs"
                    )
                )
                handles.setdefault(label, (handle, curve.runs))
                held = max(held, int((data.states.cut & curve.kept).sum()))
            if column == "gradient_norm" and (lowest := _least_of_many_magnitudes(axes)):
                axes.set_yscale("log")
                axes.set_ylim(bottom=lowest / 2)
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _share_effort(panels, unit)
        entries = [f"{shortened(label, 34)} (n = {runs})" for label, (_, runs) in handles.items()]
        legend_below(figure, [handle for handle, _ in handles.values()], entries, solved=False)
    drawing.caption = (
        f"{words}; n counts its runs. Bands: pointwise 95% t-intervals over seeds, within the quantity's range, not "
        "adjusted for the number of points. "
        + (f"What is measured in every update is a moving average over {data.window} of them. " * (data.window > 1))
        + ("From a cross on, a run that diverged or was stopped is held at its last measurement. " * bool(held))
        + ("Runs that failed or have not ended are left out." * bool((~data.states.ended).any()))
    ).strip()
    return drawing


def _share_effort(panels: list[Any], unit: str) -> None:
    """The same horizontal axis for all panels, in two columns, labelled below the last of each."""
    right = max(axes.get_xlim()[1] for axes in panels)
    for k, axes in enumerate(panels):
        axes.set_xlim(0.0, right)
        label_effort(axes, unit)
        if k + 2 < len(panels):
            axes.set_xlabel("")
            axes.tick_params(labelbottom=False)


def _line(axes: Any, curve: Curve, x: Array, style: dict[str, Any]) -> Any:
    (handle,) = axes.plot(
        x,
        curve.mean,
        color=style["color"],
        linestyle=style["linestyle"],
        marker=style["marker"],
        markersize=2.6,
        markevery=max(x.size // 5, 1),
        linewidth=1.1,
    )
    if np.isfinite(curve.low).all():
        axes.fill_between(x, curve.low, curve.high, color=style["color"], alpha=0.13, linewidth=0)
    ends = np.searchsorted(curve.updates, curve.ends)
    if ends.size:
        axes.plot(x[ends], curve.mean[ends], linestyle="none", marker="x", color=style["color"], markersize=4.5)
    return handle


def _least_of_many_magnitudes(axes: Any) -> float | None:
    """The least value drawn, where all are positive and the largest is more than 50 times that."""
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()] or [np.ones(1)])
    return float(values.min()) if (values > 0).all() and values.max() > 50 * values.min() else None
