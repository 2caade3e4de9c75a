"""The stability panel: how each cell behaved on the way; thresholds are fixed, so that a healthy study has no shade."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from klab.reports.comparison import Comparison
from klab.reports.figures.style import MUTED, PAPER, Drawing, placed, shortened, styled
from klab.reports.statistics import Array
from klab.reports.study import Study

MOST = 32


class Sign(NamedTuple):
    """A column of the panel: what is shown, and from which value on it is a warning (`start`, to `full`: darkest).

    `relative` values are taken over the median of the cells, and differences on a logarithmic scale.
    """

    name: str
    title: str
    how: str
    start: float
    full: float
    relative: bool = False


SIGNS = (
    Sign("collapse_update", "collapse at", "min", 0.0, 0.0),
    Sign("lost", "seeds lost", "sum", 0.0, 2.0),
    Sign("gradient_spikes", "gradient spikes", "mean", 2.0, 20.0),
    Sign("reverse_kl_max", "largest KL", "max", 3.0, 30.0, relative=True),
    Sign("ess_min", "smallest ESS", "min", 0.3, 0.03),
    Sign("clip_fraction", "clip fraction", "mean", 0.2, 0.6),
    Sign("entropy", "final entropy", "mean", 0.1, 0.01),
    Sign("informative_groups", "informative", "mean", 0.25, 0.05),
)


def stability_table(study: Study, task: str) -> pd.DataFrame:
    """One row per configuration: the quantities of the panel, over its seeds."""
    cells = study.cells[study.cells["task"] == task].copy()
    cells["lost"] = cells["state"].isin(["diverged", "stopped", "failed", "damaged"]).astype(float)
    metrics = study.metrics
    mine = metrics["cell"].isin(set(cells["cell"]))
    if "clip_fraction" in metrics and mine.any():
        by_cell = metrics.loc[mine].groupby("cell", observed=True)
        part = by_cell[["clip_fraction", "informative_groups"]].mean().join(by_cell["entropy"].last())
        cells = cells.join(part, on="cell")
    columns = {each.name: (each.name, each.how) for each in SIGNS if each.name in cells}
    return cells.groupby("group", sort=False).agg(**columns)


def stability_panel(study: Study, comparison: Comparison, table: pd.DataFrame) -> Drawing | None:
    """Cells by rank; the darker a shade, the more of a warning. None when nothing was measured."""
    ranked = [group for group in comparison.table["group"] if group in table.index]
    groups = ranked if len(ranked) <= MOST else [*ranked[: MOST // 2], *ranked[-MOST // 2 :]]
    columns = [column for column in SIGNS if column.name in table and table[column.name].notna().any()]
    if not groups or not columns:
        return None
    everything = table[[column.name for column in columns]].to_numpy(dtype=np.float64)
    shades = np.column_stack([shade(everything[:, j], column) for j, column in enumerate(columns)])
    rows = table.index.get_indexer(pd.Index(groups))
    values, shades = everything[rows], shades[rows]
    with styled():
        figure, axes = placed(0.8 + 0.15 * len(groups), left=1.22, right=0.42, top=0.75, bottom=0.05)
        drawing = Drawing(
            "stability",
            "Stability",
            f"Cells by rank, n = {len(comparison.seeds)} seeds. Collapse: earliest seed; largest KL and smallest "
            "effective sample size (ESS): worst seed at any time; lost: all seeds; the others: mean over seeds. "
            "Shaded, whatever the other cells do: a collapse, a lost seed, more than 2 gradient spikes per run, ESS "
            "below 0.3, a clip fraction above 0.2, entropy below 0.1 nats, less than 0.25 of the groups informative; a "
            "KL above 3 times the median of the cells."
            + (f" The best and the last {MOST // 2} cells." if len(ranked) > MOST else ""),
            "Stability of each cell: " + ", ".join(column.title for column in columns) + ".",
            figure,
        )
        axes.pcolormesh(
            np.arange(len(columns) + 1) - 0.5,
            np.arange(len(groups) + 1) - 0.5,
            np.ma.masked_invalid(np.where(shades > 0, shades, np.nan)),
            cmap="Oranges",
            vmin=-0.25,
            vmax=1.6,
            edgecolors=PAPER,
            linewidth=1.0,
        )
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        for i in range(len(groups)):
            for j in range(len(columns)):
                if np.isfinite(values[i, j]):
                    color = "#000001" if shades[i, j] > 0 else MUTED
                    axes.text(j, i, _figure(values[i, j]), ha="center", va="center", fontsize=5.5, color=color)
        axes.set_xticks(range(len(columns)), [column.title for column in columns])
        axes.xaxis.tick_top()
        for label in axes.get_xticklabels():
            label.set(rotation=52, ha="left", rotation_mode="anchor", fontsize=6)
        axes.set_yticks(range(len(groups)), [shortened(study.labels[group], 22) for group in groups], fontsize=6)
        axes.tick_params(length=0)
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return drawing


def shade(values: Array, column: Sign) -> Array:
    """0 where there is no cause for a warning, up to 1; NaN where nothing was measured."""
    if column.start == column.full:
        return np.where(np.isfinite(values), 1.0, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        if column.relative:
            values = values / np.nanmedian(values)
        if column.relative or column.full < column.start:
            share = np.log(values / column.start) / np.log(column.full / column.start)
        else:
            share = (values - column.start) / (column.full - column.start)
    return np.where(np.isnan(values), np.nan, np.clip(np.nan_to_num(share, nan=0.0, posinf=1.0, neginf=0.0), 0.0, 1.0))


def _figure(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.2g}"
