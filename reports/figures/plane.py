"""The bias–variance plane of the exact lab against what training gave."""

from __future__ import annotations

import numpy as np
import pandas as pd

from klab.reports.comparison import Comparison
from klab.reports.figures.labels import label_points
from klab.reports.figures.style import COLUMN, Drawing, canvas, styled
from klab.reports.gradients import own_drift


def bias_variance_plane(comparison: Comparison, gradients: pd.DataFrame | None) -> Drawing | None:
    """Relative bias against variance of each cell's gradient estimator, coloured by score.

    Every cell is measured after the drift that its own updates make, `gradients.own_drift`, or without any where its
    policy never drifts; the caption says which. `gradients` has the columns group, drift, bias, cosine, variance; None,
    or no row for these cells, gives no figure.
    """
    if gradients is None or gradients.empty:
        return None
    known = own_drift(gradients.dropna(subset=["bias", "variance"]))
    table = comparison.table[[group in known.index for group in comparison.table["group"]]]
    table = table[np.isfinite(table["mean"])]
    if table.empty:
        return None
    rows = known.loc[table["group"]]
    drifts = ", ".join(dict.fromkeys(rows["drift"].astype(str)))
    with styled():
        figure, (axes,) = canvas(COLUMN, 2.5)
        drawing = Drawing(
            "plane",
            "Bias and variance of the gradient, and what training made of them",
            f"One point per cell, n = {len(table)}: relative bias and trace variance of its gradient estimator on a "
            f"small enumerable policy (exact lab) at the last drift of its own updates ({drifts}); the colour is the "
            "score here.",
            "Cells by bias and variance of their gradient estimator.",
            figure,
        )
        points = axes.scatter(rows["variance"], rows["bias"], c=table["mean"], cmap="viridis", s=16, zorder=3)
        figure.colorbar(points, ax=axes, label=comparison.score.title, pad=0.01).outline.set_visible(False)
        for label, (_, row) in zip(table["label"], rows.iterrows(), strict=True):
            (point,) = axes.plot(row["variance"], row["bias"], marker="o", markersize=6, alpha=0.0, linestyle="none")
            point.set_gid(
                drawing.tip(
                    f"{label}, drift {row['drift']}: bias {row['bias']:.3g}, variance {row['variance']:.3g}, cosine "
                    f"{row['cosine']:.3g}"
                )
            )
        if (rows["variance"] > 0).all() and rows["variance"].max() > 20 * rows["variance"].min():
            axes.set_xscale("log")
        axes.set_xlabel("trace variance of the estimator")
        axes.set_ylabel("relative bias")
        if len(table) <= 16:
            label_points(figure, axes, rows["variance"].tolist(), rows["bias"].tolist(), table["label"].tolist())
    return drawing
