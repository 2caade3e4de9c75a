"""The few figures that a document about several studies shows: small PNG files, one folder per study."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from klab.reports.comparison import Comparison
from klab.reports.figures import Drawing, freeze
from klab.reports.figures.interactions import interaction_maps
from klab.reports.figures.overoptimisation import over_optimisation
from klab.reports.figures.prediction import prediction
from klab.reports.figures.style import styled
from klab.reports.figures.theory import theory_plot
from klab.reports.figures.tradeoff import tradeoff
from klab.reports.results_study import Picture
from klab.reports.study_results import StudyResults
from klab.reports.theory import predictors

_DPI = 110
_MOST = 4
"""Figures per study: the document is to stay small."""


def draw_pictures(studies: Sequence[StudyResults], folder: Path) -> None:
    """Draw a few figures of every study into `folder`/NAME, in the place of those that are there.

    Raises:
        OSError: a file cannot be written.
    """
    for each in studies:
        place = folder / each.name
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob("*.png"):
            old.unlink()
        for drawing in _drawings(each)[:_MOST]:
            freeze(drawing)
            with styled():
                drawing.figure.savefig(place / f"{drawing.name}.png", dpi=_DPI, metadata={"Software": None})


def pictures_in(folder: Path, home: Path) -> dict[str, list[Picture]]:
    """The figures that are there, by study.

    Args:
        home: the document's folder, to which the files are named relative.
    """
    found: dict[str, list[Picture]] = {}
    for file in sorted(folder.glob("*/*.png")):
        name = Path(os.path.relpath(file, home)).as_posix()
        found.setdefault(file.parent.name, []).append(Picture(name, file.stem.replace("-", " ")))
    return found


def _drawings(results: StudyResults) -> list[Drawing]:
    """What is worth a place beside the tables, the most telling kind first, of every task."""
    kinds: list[list[Drawing]] = [[] for _ in range(5)]
    for position, comparison in enumerate(results.comparisons):
        for kind, drawing in enumerate(_of_task(results, comparison)):
            if drawing is not None:
                if len(results.comparisons) > 1:
                    drawing.name = f"task{position + 1}-{drawing.name}"
                kinds[kind].append(drawing)
    return [drawing for kind in kinds for drawing in kind]


def _of_task(results: StudyResults, comparison: Comparison) -> list[Drawing | None]:
    study = results.study
    return [
        over_optimisation(study, comparison),
        tradeoff(study, comparison),
        interaction_maps(study, comparison),
        prediction(comparison),
        theory_plot(comparison, predictors(comparison, results.gradients)),
    ]
