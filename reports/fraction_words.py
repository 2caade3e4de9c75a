"""What the page says of a fractional design: which effects its cells can tell apart, and how well they predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from klab.reports.inference.factorial import LEAST_FREEDOM, Resolution, Term
from klab.reports.words import joined, number

if TYPE_CHECKING:  # `klab plan` says what a fraction can tell apart, which needs no pandas
    from klab.reports.inference.fraction import Fit


def resolution_words(found: Resolution, axes: Sequence[str], candidates: int) -> str:
    """What these cells can tell apart, in two or three sentences.

    Args:
        axes: the names of the axes.
        candidates: how many combinations the cells were chosen from.
    """
    lead = f"A fraction: effects are estimated from {found.cells} of {candidates} combinations."
    share = f"{100 * found.efficiency:.0f}% of the efficiency, per cell, of the whole product"
    if not found.fits_main:
        return (
            f"{lead} Too few to tell effects of single axes apart: that takes {found.main} coefficients and "
            f"{LEAST_FREEDOM} cells to spare."
        )
    if found.fits_pairs:
        words = (
            f"All effects of axes and of pairs of axes can be told apart ({found.pairs} coefficients), with {share}."
        )
        given = "triples of axes do not act together"
    else:
        words = (
            f"Effects of single axes can be told apart ({found.main} coefficients), with {share}; those of pairs "
            f"cannot: that takes {found.pairs + LEAST_FREEDOM} cells."
        )
        given = "pairs of axes do not act together"
    if found.alias_terms is None:
        return f"{lead} {words}"
    estimated, leak = (_term(term, axes) for term in found.alias_terms)
    return (
        f"{lead} {words} It is assumed that {given}: where {leak} do, {100 * found.alias:.0f}% of that "
        f"(root mean square, the worst case) is taken for an effect of {estimated}."
    )


def prediction_words(fit: Fit) -> str:
    """How far the effects predict the cells that were held out; empty where none was."""
    rows = fit.predictions.to_dict("records")
    if not rows:
        return ""
    parts = []
    for row in rows:
        interval = f" [{number(row['low'], 2)}, {number(row['high'], 2)}]" if np.isfinite(row["low"]) else ""
        parts.append(
            f"{row['model']}: error {number(row['rmse'])}, R² {number(row['r2'], 2)}, rank correlation "
            f"{number(row['rank_correlation'], 2)}{interval}"
        )
    noise = f" Chance alone would leave an error of {number(fit.noise)}." if np.isfinite(fit.noise) else ""
    return f"{rows[0]['cells']} cells were held out and predicted. By the effects of {'; of '.join(parts)}.{noise}"


def _term(term: Term, axes: Sequence[str]) -> str:
    return joined([axes[axis] for axis in term]) if len(term) > 1 else axes[term[0]]
