"""All figures of a report, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from klab.reports.comparison import Comparison
from klab.reports.figures.curves import axis_curves, cell_curves, training_curves
from klab.reports.figures.effects import main_effect_plot
from klab.reports.figures.effort import UPDATES
from klab.reports.figures.interactions import interaction_maps
from klab.reports.figures.overoptimisation import over_optimisation
from klab.reports.figures.paths import reward_paths
from klab.reports.figures.plane import bias_variance_plane
from klab.reports.figures.prediction import prediction
from klab.reports.figures.profiles import axis_profile
from klab.reports.figures.ranking import ranking, seed_lines
from klab.reports.figures.stability import stability_panel, stability_table
from klab.reports.figures.style import Drawing, styled
from klab.reports.figures.svg import inline_svg, svg_text
from klab.reports.figures.theory import theory_plot
from klab.reports.figures.tradeoff import tradeoff
from klab.reports.study import Study
from klab.reports.theory import predictors

__all__ = ["Drawing", "draw", "inline_svg", "save", "svg_text"]


def draw(
    study: Study, comparison: Comparison, gradients: pd.DataFrame | None = None, units: Sequence[str] = (UPDATES,)
) -> list[Drawing]:
    """Every figure that the data of this task allow, in the order of the page; curves over each of the `units` of
    effort.
    """
    curves = training_curves(study, comparison)
    found = [
        tradeoff(study, comparison),
        over_optimisation(study, comparison),
        ranking(comparison),
        main_effect_plot(study, comparison),
        interaction_maps(study, comparison),
        prediction(comparison),
        *(each for i, axis in enumerate(study.axes) for each in axis_curves(study, comparison, axis, i, curves, units)),
        *(reward_paths(study, comparison, axis, i, curves) for i, axis in enumerate(study.axes)),
        *cell_curves(study, comparison, curves, units),
        axis_profile(study, comparison),
        seed_lines(comparison),
        stability_panel(study, comparison, stability_table(study, comparison.task)),
        bias_variance_plane(comparison, gradients),
        theory_plot(comparison, predictors(comparison, gradients)),
    ]
    kept = [drawing for drawing in found if drawing is not None]
    for drawing in kept:
        freeze(drawing)
    return kept


def freeze(drawing: Drawing) -> None:
    """Computes the layout once; saving in four formats would compute it four times."""
    with styled():
        if drawing.figure.get_layout_engine() is not None:
            drawing.figure.draw_without_rendering()
            drawing.figure.set_layout_engine("none")
        _hold_labels_inside(drawing)


def _hold_labels_inside(drawing: Drawing) -> None:
    """Moves the label of a horizontal axis that is wider than its panel, and would leave the figure on one side.

    No layout does: a panel gets narrow where the labels of the other axis are long.
    """
    width = drawing.figure.bbox.width
    for axes in drawing.figure.axes:
        label = axes.xaxis.label
        extent = label.get_window_extent()
        beyond = max(extent.x1 - width, 0.0) or min(extent.x0, 0.0)
        if beyond and label.get_text():
            label.set_x(label.get_position()[0] - beyond / axes.bbox.width)


def save(drawing: Drawing, svg: str, folder: Path) -> None:
    """The figure as PDF, PNG and (from `svg_text`) SVG files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{drawing.name}.svg").write_text(svg, encoding="utf-8", errors="replace")
    with styled():
        drawing.figure.savefig(folder / f"{drawing.name}.pdf", metadata={"CreationDate": None})
        drawing.figure.savefig(folder / f"{drawing.name}.png", dpi=200)
