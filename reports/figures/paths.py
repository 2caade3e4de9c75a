"""Held-out reward against √KL along training: what each value of an axis pays in distance for its reward.

The square root is the scale of Gao, Schulman and Hilton (2023), "Scaling Laws for Reward Model Overoptimization":
close to the reference KL grows with the square of the step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from klab.reports.axes import VariedAxis
from klab.reports.comparison import Comparison
from klab.reports.figures.curves import MOST_VALUES, TrainingCurves
from klab.reports.figures.series import Cube, Curve, at_common_updates, mean_curve, representatives, root
from klab.reports.figures.style import COLUMN, Drawing, canvas, legend_below, look, shortened, styled
from klab.reports.study import Study


def reward_paths(
    study: Study, comparison: Comparison, axis: VariedAxis, position: int, data: TrainingCurves
) -> Drawing | None:
    """One line per value of `axis`; None when fewer than two can be shown or the runs were not evaluated."""
    if not {"reward", "reverse_kl"} <= set(data.cubes):
        return None
    lines = []
    for value, groups in representatives(study, comparison, axis)[:MOST_VALUES]:
        pair = root_kl_and_reward(data, groups)
        if pair is not None:
            lines.append((value, *pair))
    if len(lines) < 2:
        return None
    with styled():
        figure, (axes,) = canvas(COLUMN, 2.3 + 0.13 * ((len(lines) + 1) // 2))
        drawing = Drawing(
            f"path-{position}",
            f"Reward for distance by {axis.title}",
            "Held-out reward against √KL to the reference at every evaluation, means over runs (n). Band: pointwise "
            "95% t-interval of the reward over seeds; the large mark is the end of training, with intervals in both "
            "directions. Up and to the left is better.",
            f"Reward against the root of KL for {axis.title}: "
            + ", ".join(f"{value} ends at {reward.mean[-1]:.3f}" for value, _, reward in lines)
            + ".",
            figure,
        )
        handles = []
        for value, distance, reward in lines:
            style = look(axis.values.index(value))
            handle = _path(axes, distance, reward, style)
            handle.set_gid(
                drawing.tip(
                    f"{value}: held-out reward {reward.mean[-1]:.3f} at √KL {distance.mean[-1]:.3g}, n = {reward.runs} "
                    "runs"
                )
            )
            handles.append((handle, f"{shortened(value, 24)} (n = {reward.runs})"))
        axes.set_xlabel("√ of KL(policy ‖ reference), nats per trajectory")
        axes.set_ylabel("held-out reward")
        axes.set_xlim(left=0.0)
        legend_below(figure, *zip(*handles, strict=True))
    return drawing


def root_kl_and_reward(data: TrainingCurves, groups: list[int]) -> tuple[Curve, Curve] | None:
    """The mean curves of √KL and of held-out reward, at the same updates."""
    found = at_common_updates(mean_curve(root_kl(data), data.states, groups), data.mean("reward", groups))
    return (found[0], found[1]) if found else None


def root_kl(data: TrainingCurves) -> Cube:
    """√KL to the starting policy, of every run at its evaluations."""
    return root(data.cubes["reverse_kl"])


def _path(axes: Any, distance: Curve, reward: Curve, style: dict[str, Any]) -> Any:
    color = style["color"]
    (handle,) = axes.plot(
        distance.mean, reward.mean, color=color, linestyle=style["linestyle"], marker=style["marker"], markersize=2.2
    )
    if np.isfinite(reward.low).all():
        around = np.concatenate([reward.low, reward.high[::-1]])
        axes.fill(np.concatenate([distance.mean, distance.mean[::-1]]), around, color=color, alpha=0.12, linewidth=0)
        end = (distance.mean[-1], reward.mean[-1])
        axes.plot([end[0]] * 2, [reward.low[-1], reward.high[-1]], color=color, linewidth=1.0)
        axes.plot([max(distance.low[-1], 0.0), distance.high[-1]], [end[1]] * 2, color=color, linewidth=1.0)
    axes.plot(distance.mean[-1], reward.mean[-1], color=color, linestyle="none", marker=style["marker"], markersize=5.5)
    return handle
