"""The stability panel: how each cell behaved on the way, as a table of shades."""

from __future__ import annotations

import numpy as np
import pandas as pd

from klab.reports.comparison import Comparison
from klab.reports.figures.style import MUTED, PAPER, WIDE, Drawing, canvas, shortened, styled
from klab.reports.statistics import Array
from klab.reports.study import Study

MOST = 32
_COLUMNS = (
    ("collapse_update", "collapse\nat update", "min", False),
    ("lost", "seeds\nlost", "sum", True),
    ("gradient_spikes", "gradient\nspikes", "mean", True),
    ("reverse_kl_max", "largest\nKL", "max", True),
    ("ess_min", "smallest\nESS", "min", False),
    ("clip_fraction", "clip\nfraction", "mean", True),
    ("entropy", "final\nentropy", "mean", False),
    ("informative_groups", "informative\ngroups", "mean", False),
)


def stability_table(study: Study, task: str) -> pd.DataFrame:
    """One row per configuration: the quantities of the panel, over its seeds."""
    cells = study.cells[study.cells["task"] == task].copy()
    cells["lost"] = cells["state"].isin(["diverged", "failed", "damaged"]).astype(float)
    metrics = study.metrics
    mine = metrics["cell"].isin(set(cells["cell"]))
    if "clip_fraction" in metrics and mine.any():
        by_cell = metrics.loc[mine].groupby("cell", observed=True)
        part = by_cell[["clip_fraction", "informative_groups"]].mean().join(by_cell["entropy"].last())
        cells = cells.join(part, on="cell")
    columns = {name: (name, how) for name, _, how, _ in _COLUMNS if name in cells}
    return cells.groupby("group", sort=False).agg(**columns)


def stability_panel(study: Study, comparison: Comparison, table: pd.DataFrame) -> Drawing | None:
    """Cells by rank; the darker a shade, the more of a warning. None when nothing was measured."""
    ranked = [group for group in comparison.table["group"] if group in table.index]
    groups = ranked if len(ranked) <= MOST else [*ranked[: MOST // 2], *ranked[-MOST // 2 :]]
    columns = [column for column in _COLUMNS if column[0] in table and table[column[0]].notna().any()]
    if not groups or not columns:
        return None
    values = table.loc[groups, [name for name, *_ in columns]].to_numpy(dtype=np.float64)
    shades = np.column_stack([_shade(values[:, j], high) for j, (*_, high) in enumerate(columns)])
    with styled():
        figure, (axes,) = canvas(WIDE, 0.75 + 0.19 * len(groups))
        drawing = Drawing(
            "stability",
            "Stability",
            "Cells by rank. Collapse: earliest seed; largest KL and smallest effective sample size: worst seed at "
            "any time; the others: mean over "
            "seeds. Darker is more of a warning within a column; empty: did not happen or was not measured."
            + (f" The best and the last {MOST // 2} cells." if len(ranked) > MOST else ""),
            "Stability of each cell: " + ", ".join(title.replace("\n", " ") for _, title, *_ in columns) + ".",
            figure,
        )
        axes.pcolormesh(
            np.arange(len(columns) + 1) - 0.5,
            np.arange(len(groups) + 1) - 0.5,
            np.ma.masked_invalid(shades),
            cmap="Oranges",
            vmin=0.0,
            vmax=1.6,
            edgecolors=PAPER,
            linewidth=1.0,
        )
        axes.invert_yaxis()
        names = study.labels
        for i in range(len(groups)):
            for j in range(len(columns)):
                if np.isfinite(values[i, j]):
                    axes.text(j, i, _figure(values[i, j]), ha="center", va="center", fontsize=7, color="#000001")
        axes.set_xticks(range(len(columns)), [title for _, title, *_ in columns])
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(groups)), [shortened(names[group], 44) for group in groups])
        axes.tick_params(length=0)
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(axis="y", labelcolor=MUTED)
    return drawing


def _shade(column: Array, high_is_warning: bool) -> Array:
    """0 … 1 within the column, 1 the worst; a nearly constant column has no shade, a missing number none."""
    low, high = np.nanmin(column), np.nanmax(column)
    if high - low <= 0.05 * max(abs(high), abs(low), 1e-300):
        return np.where(np.isfinite(column), 0.0, np.nan)
    share = (column - low) / (high - low)
    return share if high_is_warning else 1.0 - share


def _figure(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.2g}"
