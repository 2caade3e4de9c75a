"""All figures of a report, and their files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from klab.reports.comparison import Comparison
from klab.reports.figures.curves import axis_curves, cell_curves, curve_cubes
from klab.reports.figures.effects import interaction_maps, main_effect_plot
from klab.reports.figures.plane import bias_variance_plane
from klab.reports.figures.ranking import ranking, seed_lines
from klab.reports.figures.stability import stability_panel, stability_table
from klab.reports.figures.style import Drawing, styled
from klab.reports.figures.svg import inline_svg, svg_text
from klab.reports.figures.tradeoff import tradeoff
from klab.reports.study import Study

__all__ = ["Drawing", "draw", "inline_svg", "save", "svg_text"]


def draw(study: Study, comparison: Comparison, gradients: pd.DataFrame | None = None) -> list[Drawing]:
    """Every figure that the data of this task allow, in the order of the page."""
    cubes = curve_cubes(study, comparison)
    found = [
        tradeoff(study, comparison),
        ranking(comparison),
        main_effect_plot(study, comparison),
        interaction_maps(study, comparison),
        *(axis_curves(study, comparison, axis, i, cubes) for i, axis in enumerate(study.axes)),
        cell_curves(study, comparison, cubes),
        seed_lines(comparison),
        stability_panel(study, comparison, stability_table(study, comparison.task)),
        bias_variance_plane(comparison, gradients),
    ]
    kept = [drawing for drawing in found if drawing is not None]
    for drawing in kept:
        freeze(drawing)
    return kept


def freeze(drawing: Drawing) -> None:
    """Computes the layout once; saving in four formats would compute it four times."""
    with styled():
        drawing.figure.draw_without_rendering()
        drawing.figure.set_layout_engine("none")


def save(drawing: Drawing, svg: str, folder: Path) -> None:
    """The figure as PDF, PNG and (from `svg_text`) SVG files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{drawing.name}.svg").write_text(svg, encoding="utf-8", errors="replace")
    with styled():
        drawing.figure.savefig(folder / f"{drawing.name}.pdf", metadata={"CreationDate": None})
        drawing.figure.savefig(folder / f"{drawing.name}.png", dpi=200)
