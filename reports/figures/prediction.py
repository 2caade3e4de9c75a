"""How far the effects of axes predict whole cells: predicted against observed scores of a fractional design."""

from __future__ import annotations

import numpy as np

from klab.reports.comparison import Comparison
from klab.reports.figures.style import COLUMN, MUTED, RULE, SERIES, Drawing, canvas, legend_below, styled


def prediction(comparison: Comparison) -> Drawing | None:
    """One point per cell, those that were held out on top; None where the design is no fraction, or nothing fits."""
    fit = comparison.analysis.fit
    if fit is None or not len(fit.cells) or not np.isfinite(fit.cells["predicted"]).any():
        return None
    held = fit.cells["held_out"].to_numpy()
    observed, predicted = fit.cells["observed"].to_numpy(), fit.cells["predicted"].to_numpy()
    groups = np.asarray(comparison.groups, dtype=object)[fit.cells["cell"].to_numpy()]
    labels = dict(zip(comparison.table["group"], comparison.table["label"], strict=True))
    terms = "axes and pairs of axes" if fit.resolution.fits_pairs else "axes, without pairs"
    with styled():
        figure, (axes,) = canvas(COLUMN, 3.0)
        drawing = Drawing(
            "prediction",
            "Do the effects of axes predict a cell?",
            f"Mean {comparison.score.title} of every cell over its seeds, against the prediction of the model with "
            f"{terms}. Filled: {int(held.sum())} cells that were held out of the fit. Grey: the {int((~held).sum())} "
            "cells that it was fitted to, which lie nearer to the line for that reason. "
            + (f"Chance alone leaves a standard error of {fit.noise:.3f}." if np.isfinite(fit.noise) else ""),
            "Observed against predicted scores of the held-out cells: "
            + "; ".join(f"{labels[groups[i]]} {predicted[i]:.3f}, {observed[i]:.3f}" for i in np.flatnonzero(held)[:5])
            + ".",
            figure,
        )
        ends = [float(np.nanmin([observed, predicted])), float(np.nanmax([observed, predicted]))]
        axes.plot(ends, ends, color=RULE, linewidth=0.8, zorder=1)
        axes.plot(
            predicted[~held], observed[~held], "o", markersize=2.4, color=MUTED, alpha=0.5, label="fitted", zorder=2
        )
        for i in np.flatnonzero(held):
            axes.plot(
                [predicted[i]],
                [observed[i]],
                "o",
                markersize=4,
                color=SERIES[0],
                label="held out" if i == np.flatnonzero(held)[0] else None,
                gid=drawing.tip(f"{labels[groups[i]]}: predicted {predicted[i]:.3f}, observed {observed[i]:.3f}"),
                zorder=3,
            )
        axes.set_xlabel("predicted")
        axes.set_ylabel("observed")
        legend_below(figure, *axes.get_legend_handles_labels())
    return drawing
