"""Over-optimisation: the proxy that training maximises and the gold reward behind it, against the distance travelled.

The picture of Gao, Schulman and Hilton (2023), "Scaling Laws for Reward Model Overoptimization", figure 1.
"""

from __future__ import annotations

from typing import Any

from klab.grid.score import PARTS
from klab.reports.comparison import Comparison
from klab.reports.figures.curves import TrainingCurves
from klab.reports.figures.paths import at_common_updates, root_kl
from klab.reports.figures.series import Curve, cube, mean_curve
from klab.reports.figures.style import COLUMN, Drawing, canvas, legend_below, look, shortened, styled
from klab.reports.study import Study

PROXY, GOLD = f"{PARTS}proxy", f"{PARTS}gold"
_MOST = 8
"""Configurations that are drawn: the best by the score, and the baseline."""


def over_optimisation(study: Study, comparison: Comparison, data: TrainingCurves) -> Drawing | None:
    """Proxy above, gold below, a line per configuration; None where the task has no proxy, or nothing was evaluated."""
    if not {PROXY, GOLD} <= set(study.evaluations.columns) or "reverse_kl" not in data.cubes:
        return None
    lines = []
    for group in _shown(comparison):
        found = _paths(study, comparison, data, comparison.groups.index(group))
        if found is not None:
            lines.append((comparison.table.set_index("group")["label"][group], found))
    if not lines:
        return None
    with styled():
        figure, (upper, lower) = canvas(COLUMN, 3.6 + 0.13 * ((len(lines) + 1) // 2), 2, 1)
        drawing = Drawing(
            "over-optimisation",
            "Proxy and gold reward along training",
            "Held-out rewards at every evaluation against √KL to the reference, means over runs. Above: the proxy that "
            "training maximises, in standard deviations of the starting policy's completions. Below: the gold reward "
            "that it stands for. Large mark: the most gold; small mark at the end: where training stopped.",
            "; ".join(
                f"{label}: most gold {gold.mean.max():.3f} at √KL {distance.mean[gold.mean.argmax()]:.2f}, last "
                f"{gold.mean[-1]:.3f} at {distance.mean[-1]:.2f}"
                for label, (distance, _, gold) in lines
            )
            + ".",
            figure,
        )
        handles = []
        for position, (label, (distance, proxy, gold)) in enumerate(lines):
            style: dict[str, Any] = look(position)
            plain = {"color": style["color"], "linestyle": style["linestyle"]}
            best = int(gold.mean.argmax())
            text = (
                f"{label}: most gold {gold.mean[best]:.3f} at √KL {distance.mean[best]:.2f}, then {gold.mean[-1]:.3f} "
                f"at {distance.mean[-1]:.2f}"
            )
            upper.plot(distance.mean, proxy.mean, gid=drawing.tip(text), **plain)
            (handle,) = lower.plot(distance.mean, gold.mean, gid=drawing.tip(text), **plain)
            marked = {"color": style["color"], "marker": style["marker"], "linestyle": "none"}
            lower.plot(distance.mean[best], gold.mean[best], markersize=5.5, **marked)
            lower.plot(distance.mean[-1], gold.mean[-1], markersize=2.8, **marked)
            handles.append((handle, f"{shortened(label, 24)} (n = {gold.runs})"))
        upper.set_ylabel("proxy reward")
        lower.set_ylabel("gold reward")
        lower.set_xlabel("√ of KL(policy ‖ reference), nats per trajectory")
        upper.set_xlim(left=0.0)
        lower.set_xlim(upper.get_xlim())
        legend_below(figure, *zip(*handles, strict=True))
    return drawing


def _shown(comparison: Comparison) -> list[str]:
    known = [group for group in comparison.table["group"] if group != comparison.baseline]
    base = [] if comparison.baseline is None else [comparison.baseline]
    return [*base, *known[: _MOST - len(base)]]


def _paths(study: Study, comparison: Comparison, data: TrainingCurves, group: int) -> tuple[Curve, Curve, Curve] | None:
    """√KL, proxy and gold of one configuration, at the same updates."""
    rewards = [cube(study, comparison, study.evaluations, column) for column in (PROXY, GOLD)]
    found = at_common_updates(*(mean_curve(each, data.states, [group]) for each in (root_kl(data), *rewards)))
    return (found[0], found[1], found[2]) if found else None
