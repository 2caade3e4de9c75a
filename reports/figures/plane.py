"""The bias–variance plane of the exact lab against what training gave."""

from __future__ import annotations

import numpy as np
import pandas as pd

from klab.reports.comparison import Comparison
from klab.reports.figures.style import NARROW, WIDE, Drawing, canvas, shortened, styled


def bias_variance_plane(comparison: Comparison, gradients: pd.DataFrame | None) -> Drawing | None:
    """Relative bias against variance of each cell's gradient estimator, coloured by score.

    `gradients` has the columns group, bias, cosine, variance; None, or no row for these cells, gives no figure.
    """
    if gradients is None or gradients.empty:
        return None
    known = gradients.dropna(subset=["bias", "variance"]).drop_duplicates("group").set_index("group")
    table = comparison.table[[group in known.index for group in comparison.table["group"]]]
    table = table[np.isfinite(table["mean"])]
    if table.empty:
        return None
    rows = known.loc[table["group"]]
    with styled():
        figure, (axes,) = canvas(WIDE, NARROW)
        drawing = Drawing(
            "plane",
            "Bias and variance of the gradient, and what training made of them",
            "One point per cell: relative bias and trace variance of its gradient estimator on a small enumerable "
            "policy (exact lab); the colour "
            "is the final score here.",
            "Cells by bias and variance of their gradient estimator.",
            figure,
        )
        points = axes.scatter(rows["variance"], rows["bias"], c=table["mean"], cmap="viridis", s=26, zorder=3)
        figure.colorbar(points, ax=axes, label=comparison.score.title, pad=0.01).outline.set_visible(False)
        for label, (_, row) in zip(table["label"], rows.iterrows(), strict=True):
            (point,) = axes.plot(row["variance"], row["bias"], marker="o", markersize=6, alpha=0.0, linestyle="none")
            point.set_gid(
                drawing.tip(
                    f"{label}: bias {row['bias']:.3g}, variance {row['variance']:.3g}, cosine {row['cosine']:.3g}"
                )
            )
            if len(table) <= 16:
                axes.annotate(
                    shortened(label, 24),
                    (row["variance"], row["bias"]),
                    xytext=(5, 3),
                    textcoords="offset points",
                    fontsize=6.5,
                )
        if (rows["variance"] > 0).all() and rows["variance"].max() > 20 * rows["variance"].min():
            axes.set_xscale("log")
        axes.set_xlabel("trace variance of the estimator")
        axes.set_ylabel("relative bias")
    return drawing
