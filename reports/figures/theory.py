"""How well each number of the exact lab predicts the score: rank correlations with their intervals."""

from __future__ import annotations

from klab.reports.comparison import Comparison
from klab.reports.figures.style import COLUMN, RULE, SERIES, Drawing, canvas, styled
from klab.reports.theory import Predictor


def theory_plot(comparison: Comparison, found: list[Predictor]) -> Drawing | None:
    """One row per number of the lab; None where none was measured."""
    if not found:
        return None
    counts = [each.cells for each in found]
    cells = dict.fromkeys((min(counts), max(counts)))
    with styled():
        figure, (axes,) = canvas(COLUMN, 0.75 + 0.26 * len(found))
        drawing = Drawing(
            "theory",
            "Which number of the lab predicts the score?",
            f"Spearman's rank correlation between the exact lab's number for a cell's gradient and the cell's mean "
            f"{comparison.score.title}, over n = {'–'.join(map(str, cells))} cells, with joint 95% intervals. The lab "
            "measures after a drift as large as training showed.",
            "; ".join(f"{each.title}: {each.correlation:.2f} [{each.low:.2f}, {each.high:.2f}]" for each in found)
            + ".",
            figure,
        )
        axes.axvline(0.0, color=RULE, linewidth=0.8)
        for place, each in enumerate(reversed(found)):
            axes.plot([each.low, each.high], [place, place], color=SERIES[0], linewidth=1.2)
            axes.plot(
                [each.correlation],
                [place],
                "o",
                markersize=4,
                color=SERIES[0],
                gid=drawing.tip(f"{each.title}: {each.correlation:.2f}; fails most for {', '.join(each.missed)}"),
            )
        axes.set_yticks(range(len(found)), [each.title for each in reversed(found)])
        axes.set_xlim(-1.05, 1.05)
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.set_xlabel("rank correlation with the score")
    return drawing
