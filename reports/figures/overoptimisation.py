"""Over-optimisation: the proxy that training maximises and the gold reward behind it, against the distance travelled.

The picture of Gao, Schulman and Hilton (2023), "Scaling Laws for Reward Model Overoptimization", figure 1.
"""

from __future__ import annotations

from typing import Any

from klab.reports.comparison import Comparison
from klab.reports.figures.gold_paths import paths
from klab.reports.figures.style import COLUMN, Drawing, canvas, legend_below, look, shortened, styled
from klab.reports.study import Study

_MOST = 8
"""Configurations that are drawn: the best by the score, and the baseline."""


def over_optimisation(study: Study, comparison: Comparison) -> Drawing | None:
    """Proxy above, gold below, a line per configuration; None where no gold was recorded, or nothing was evaluated."""
    found = {path.group: path for path in paths(study, comparison)}
    shown = [found[group] for group in _shown(comparison) if group in found]
    lines = [(path.label, (path.distance, path.proxy, path.gold)) for path in shown]
    if not lines:
        return None
    with styled():
        figure, (upper, lower) = canvas(COLUMN, 3.6 + 0.13 * ((len(lines) + 1) // 2), 2, 1)
        drawing = Drawing(
            "over-optimisation",
            "Proxy and gold reward along training",
            "Held-out rewards at every evaluation against √KL to the reference, means over runs. Above: the proxy that "
            "training maximises; a reward model's is in standard deviations of the starting policy's completions. "
            "Below: the gold reward that it stands for. Large mark: the most gold; small mark at the end: where "
            "training stopped.",
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
            handles.append((handle, f"{shortened(label, 40)} (n = {gold.runs})"))
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
