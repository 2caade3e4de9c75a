"""The figures of the book of claims, drawn from the numbers that its claims measure.

Two of them are the interactive figures of Bai & Zhang 2026 as still images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from klab.harness.claims.drift import DRIFTS, WEIGHTS, random_drift, update_drift
from klab.harness.claims.estimator_values import crossing, gaussian_estimators
from klab.harness.claims.fixed_points import PLACEMENTS, PRIOR, rest, threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F", "#8C510A", "#5E3C99")
"""Okabe and Ito's palette and two more: distinguishable without red-green vision."""
MARKERS = "osD^vP*X<>"

STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.use": True,
    "savefig.bbox": "tight",
    "pdf.fonttype": 42,
}


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def estimator_variance() -> Figure:
    """Variance of k1, k2, k3 against KL for shifted Gaussians, with the crossing of k1 and k3 (C01, C02)."""
    figure, (left, right) = _panels(1, 2, 7.0, 2.8)
    divergences = np.logspace(-3, math.log10(3), 60)
    moments = [gaussian_estimators(math.sqrt(2 * divergence)) for divergence in divergences]
    for name, colour in zip(("k1", "k2", "k3"), COLOURS, strict=False):
        left.plot(divergences, [moment[name][1] for moment in moments], color=colour, label=name)
        right.plot(
            divergences,
            [math.sqrt(moment[name][1]) / d for moment, d in zip(moments, divergences, strict=True)],
            color=colour,
        )
    for axes in (left, right):
        axes.axvline(crossing(), color="#7F7F7F", linestyle=":", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="KL(π‖ref) [nats]")
    left.annotate(
        f"{crossing():.3f} nats",
        (crossing(), 2e-5),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        color="#555555",
    )
    left.set(ylabel="variance", title="Variance of one sample")
    right.set(ylabel="standard deviation / KL", title="Relative standard deviation")
    left.legend(loc="upper left")
    return figure


def ratio_quality() -> Figure:
    """Bias and variance of every importance weight against drift, random and by inner updates (C30-C33, C39)."""
    figure, (left, right) = _panels(1, 2, 7.0, 3.4)
    sizes = np.geomspace(DRIFTS[0], DRIFTS[-1], 7)
    drifts = [random_drift(float(size), baseline=True) for size in sizes]
    updated = update_drift(baseline=True)
    x = [drift.divergence for drift in drifts]
    for index, name in enumerate(WEIGHTS):
        colour, marker = COLOURS[index], MARKERS[index]
        biases = [drift.quality[name].bias for drift in drifts]
        left.plot(
            x, [bias if bias > 1e-9 else 0.0 for bias in biases], color=colour, marker=marker, markersize=3, label=name
        )
        left.plot(
            updated.divergence,
            max(updated.quality[name].bias, 0.0),
            color=colour,
            marker=marker,
            markersize=6,
            mfc="none",
            linestyle="",
        )
        right.plot(x, [drift.quality[name].variance for drift in drifts], color=colour, marker=marker, markersize=3)
        right.plot(
            updated.divergence,
            updated.quality[name].variance,
            color=colour,
            marker=marker,
            markersize=6,
            mfc="none",
            linestyle="",
        )
    left.set(xscale="log", xlabel="KL(π_old‖π) [nats]", ylabel="relative bias", title="Bias of the expected gradient")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="KL(π_old‖π) [nats]",
        ylabel="trace variance per trajectory",
        title="Variance",
    )
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(
        "V=3, H=4, centred binary reward; lines: random drift, open marks: four inner updates",
        fontsize=8,
        x=0.01,
        ha="left",
    )
    return figure


def product_variance() -> Figure:
    """Products of valid ratios explode, geometric means do not (C32); the second interactive figure of Bai & Zhang."""
    figure, (left, right) = _panels(1, 2, 7.0, 2.9)
    horizons = np.arange(1, 201)
    for sigma, style in ((0.1, "-"), (0.2, "--")):
        s2 = sigma**2
        left.plot(horizons, np.expm1(horizons * s2), color=COLOURS[1], linestyle=style, label=f"product, σ = {sigma:g}")
        left.plot(
            horizons,
            np.full(len(horizons), np.expm1(s2)),
            color=COLOURS[0],
            linestyle=style,
            label=f"token, σ = {sigma:g}",
        )
        geometric = np.exp(-s2 + s2 / horizons) * np.expm1(s2 / horizons)
        left.plot(horizons, geometric, color=COLOURS[2], linestyle=style, label=f"geometric mean, σ = {sigma:g}")
    left.set(yscale="log", xlabel="horizon H", ylabel="variance of the weight", title="Variance, E[ρ] = 1")
    left.legend(ncols=2, loc="upper left", fontsize=6)
    left.set_ylim(1e-6, 1e8)
    rng = np.random.default_rng(0)
    sigma, horizon = 0.5, 10
    own = rng.normal(-(sigma**2) / 2, sigma, (100_000, horizon))
    bins = np.linspace(-7, 5, 121)
    samples = (("product", own.sum(1)), ("token", own[:, 0]), ("geometric mean", own.mean(1)))
    for (name, values), colour in zip(samples, (COLOURS[1], COLOURS[0], COLOURS[2]), strict=True):
        right.hist(
            values / math.log(10),
            bins=(bins / math.log(10)).tolist(),
            density=True,
            histtype="stepfilled",
            alpha=0.45,
            color=colour,
            label=name,
        )
    right.set(xlabel="log₁₀ weight", ylabel="density", title=f"H = {horizon}, σ = {sigma:g}")
    right.legend()
    return figure


def coverage() -> Figure:
    """Which tokens the return r_j and each ratio at j cover (C30, C31, C34; first figure of Bai & Zhang)."""
    figure, panels = _panels(2, 4, 7.0, 3.6)
    horizon = 8
    token = np.arange(horizon)
    rows, columns = token[:, None], token[None, :]
    diagonal, future, past, every = rows == columns, columns >= rows, columns <= rows, np.ones((horizon, horizon), bool)
    what = {
        "r_j: KL of these tokens": future,
        "token": diagonal,
        "future mean": future / (horizon - rows),
        "GSPO mean": every / horizon,
        "future product (the 'ideal' weight)": future,
        "prefix product": past,
        "full product (exact)": every,
        "what exactness needs": every,
    }
    for axes, (name, weight) in zip(panels, what.items(), strict=True):
        axes.imshow(np.asarray(weight, dtype=float), cmap="Blues", vmin=0, vmax=1.3, origin="upper")
        axes.set_title(name, fontsize=7)
        axes.grid(False)
        axes.set_xticks([0, horizon - 1], ["1", "H"])
        axes.set_yticks([0, horizon - 1], ["1", "H"])
    for axes in panels[4:]:
        axes.set_xlabel("token i that enters")
    for axes in panels[::4]:
        axes.set_ylabel("position j")
    return figure


def placement_fixed_points() -> Figure:
    """Failure mass at rest against beta for every placement (C23)."""
    figure, (axes,) = _panels(1, 1, 4.6, 3.1)
    betas = np.geomspace(0.03, 4, 45)
    for placement, colour in zip(PLACEMENTS, COLOURS, strict=False):
        points = [(beta, rest(placement, float(beta))) for beta in betas]
        stable = [(beta, roots[-1]) for beta, roots in points if roots]
        axes.plot(*zip(*stable, strict=True), color=colour, label=placement)
        unstable = [(beta, roots[0]) for beta, roots in points if len(roots) > 1]
        if unstable:
            axes.plot(*zip(*unstable, strict=True), color=colour, linestyle=":", label=f"{placement}: unstable")
    axes.axhline(1 - PRIOR, color="#7F7F7F", linewidth=0.8)
    axes.annotate(
        "reference", (0.031, 1 - PRIOR), xytext=(0, -9), textcoords="offset points", fontsize=7, color="#555555"
    )
    axes.axvline(threshold(), color="#7F7F7F", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="β", ylabel="failure mass 1 − p at rest", ylim=(1e-4, 1.2))
    axes.set_title(f"Where each placement rests, reference success mass {PRIOR:g}")
    axes.legend(loc="lower right")
    return figure


def bias_variance_plane() -> Figure:
    """Every ratio x weight in the plane of squared bias and variance, with lines of equal error (C30-C3D)."""
    from klab.harness.claims.plane import cells

    figure, (axes,) = _panels(1, 1, 5.6, 4.0)
    found = cells()
    ratios = sorted({cell.ratio for cell in found}, key=lambda name: [cell.ratio for cell in found].index(name))
    weights = sorted({cell.weight for cell in found}, key=lambda name: [cell.weight for cell in found].index(name))
    floor = 1e-4
    for cell in found:
        axes.plot(
            max(cell.squared_bias, floor),
            cell.variance,
            marker=MARKERS[weights.index(cell.weight)],
            color=COLOURS[ratios.index(cell.ratio)],
            linestyle="",
            markersize=5,
            alpha=0.85,
        )
    for ratio, colour in zip(ratios, COLOURS, strict=False):
        axes.plot([], [], color=colour, linewidth=4, label=ratio)
    for weight, marker in zip(weights, MARKERS, strict=False):
        axes.plot([], [], color="#444444", marker=marker, linestyle="", markersize=5, label=weight)
    squared = np.geomspace(floor, max(cell.squared_bias for cell in found) * 1.5, 200)
    top, bottom = (bound(cell.variance for cell in found) for bound in (max, min))
    for size in (16, 128, 1024):
        error = min(cell.squared_bias + cell.variance / size for cell in found)
        axes.plot(
            squared,
            np.where(squared < error, (error - squared) * size, np.nan),
            color="#999999",
            linewidth=0.8,
            linestyle="--",
        )
        axes.annotate(f"n = {size}", (floor * 1.05, (error - floor) * size), fontsize=6.5, color="#666666", va="bottom")
    axes.set(
        xscale="log", yscale="log", ylim=(bottom / 1.3, top * 1.3), xlabel="squared bias / |∇J|²  (left edge: exact)"
    )
    axes.set_ylabel("trace variance per trajectory / |∇J|²")
    axes.set_title("Ratio × weight at drift .3; dashed: equal error of the best with n trajectories")
    axes.legend(ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=6.5)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "estimator_variance": estimator_variance,
    "ratio_quality": ratio_quality,
    "product_variance": product_variance,
    "coverage": coverage,
    "fixed_points": placement_fixed_points,
    "bias_variance_plane": bias_variance_plane,
}
"""Every figure by the name of its file."""


def draw_all(folder: Path) -> list[Path]:
    """Write every figure as PDF and PNG into `folder`; the files written."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw()
            for suffix in ("pdf", "png"):
                path = folder / f"{name}.{suffix}"
                figure.savefig(path, dpi=200, metadata={"CreationDate": None} if suffix == "pdf" else None)
                written.append(path)
    return written
