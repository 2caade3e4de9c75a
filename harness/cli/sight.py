"""What a study can see, for `klab plan`: detectable differences, seeds that a difference needs, and what is decided
never."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klab.grid import Grid

if TYPE_CHECKING:
    from klab.reports.inference.power import Noise, PlannedDesign

ASSUMED_SD = 0.03
"""Of runs of one cell, where no pilot run measured it: about that of the demo's held-out reward, whose range is 1."""

PilotOption = Annotated[
    str | None, typer.Option("--pilot", metavar="RUN", help="A run whose variances say what this study can see.")
]
DeviationOption = Annotated[
    float | None,
    typer.Option("--sd", help=f"Standard deviation of runs of one cell, instead of a pilot; default: {ASSUMED_SD}."),
]
DetectOption = Annotated[
    float | None, typer.Option("--detect", help="Say how many seeds per cell find a difference of this size.")
]


@dataclass(frozen=True)
class Deviation:
    """The noise that is expected, and where that comes from, in words."""

    noise: Noise
    source: str


@dataclass(frozen=True)
class Sight:
    """What is seen at the planned seeds.

    Attributes:
        contrast: the difference between a cell and the baseline that is found with power 0.8; None: never.
        effects: by axis, the same of its mean effect, where the design crosses axes.
        detect: the difference that was asked about, and the seeds per cell that find it (None: more than 2000).
        warnings: why nothing, or little, can be decided.
        fraction: of a fractional design, which effects its cells can tell apart; empty of others.
    """

    seeds: int
    contrasts: int
    contrast: float | None
    effects: dict[str, float]
    detect: tuple[float, int | None] | None
    deviation: Deviation
    warnings: tuple[str, ...]
    fraction: str = ""

    def lines(self) -> list[str]:
        """What `klab plan` prints."""
        found = []
        if self.contrast is not None:
            count = "1 contrast" if self.contrasts == 1 else f"{self.contrasts} contrasts"
            found.append(
                f"{self.seeds} seeds find a difference of {self.contrast:.2g} from the baseline with power 0.8"
                f" ({count})" + "".join(f"; of {size:.2g} by {axis} alone" for axis, size in self.effects.items())
            )
        if self.detect is not None and self.contrasts:
            difference, seeds = self.detect
            needed = "more than 2000 seeds" if seeds is None else f"{seeds} seeds"
            found.append(f"a difference of {difference:g} needs {needed} per cell")
        found.append(f"standard deviation of runs of one cell: {self.deviation.source}")
        if self.fraction:
            found.append(self.fraction)
        return [*found, *(f"warning: {warning}" for warning in self.warnings)]

    def record(self) -> dict[str, Any]:
        """The same for programs."""
        asked = None if self.detect is None else {"difference": self.detect[0], "seeds": self.detect[1]}
        noise = self.deviation.noise
        return {
            "power": 0.8,
            "seeds": self.seeds,
            "contrasts": self.contrasts,
            "detectable_difference": self.contrast,
            "detectable_effects": self.effects,
            "detect": asked,
            "sd": noise.run,
            "sd_seed_axis": dict(noise.axes),
            "sd_from": self.deviation.source,
            "warnings": list(self.warnings),
            **({"fraction": self.fraction} if self.fraction else {}),
        }


def sight(study: Grid, deviation: Deviation, detect: float | None) -> Sight:
    """What the study as planned can see.

    Args:
        study: the grid, in which equal algorithms were merged.
        detect: a difference whose seeds are wanted.
    """
    from klab.reports.inference.power import detectable_contrast, detectable_effect, seeds_needed

    seeds, noise = len(study.seeds), deviation.noise
    design = planned_design(study, seeds)
    compared = design is not None and design.contrasts > 0
    contrast = detectable_contrast(design, seeds, noise) if design and compared and seeds > 1 else None
    effects = {}
    if design is not None and compared and seeds > 1:
        effects = {axis: detectable_effect(design, axis, seeds, noise) for axis, _ in design.crossed}
    asked = None
    if detect is not None:
        needed = None

        def seen(count: int) -> float:
            grown = planned_design(study, count)
            return detectable_contrast(grown, count, noise) if grown else float("nan")

        if compared:
            needed = seeds_needed(seen, detect)
        asked = (detect, needed)
    return Sight(
        seeds,
        design.contrasts if design else 0,
        contrast,
        effects,
        asked,
        deviation,
        tuple(_warnings(study, contrast)),
        _fraction_words(study),
    )


def _fraction_words(study: Grid) -> str:
    if study.fraction is None:
        return ""
    import numpy as np

    from klab.reports.fraction_words import resolution_words
    from klab.reports.inference.factorial import resolution

    found = resolution(np.asarray(study.fraction.codes, dtype=np.intp), study.fraction.levels)
    words = resolution_words(found, list(study.axes), study.fraction.candidates)
    held_out = len(study.fraction.held_out)
    return f"{words} {held_out} more are held out and predicted." if held_out else words


def planned_design(study: Grid, seeds: int) -> PlannedDesign | None:
    """The design of a study with so many seeds; None where it has no baseline."""
    from klab.reports.inference.error_rate import ALPHA, look_level
    from klab.reports.inference.power import PlannedDesign

    if study.baseline is None:
        return None
    tasks = Counter({cell.group: cell.task for cell in study.cells}.values())
    axes = [
        (axis, len(values))
        for axis, values in study.axes.items()
        if len(values) > 1 and not axis.startswith("task") and axis != "policy"
    ]
    stop = study.analysis.stop if study.analysis else None
    alpha = look_level((seeds,), max(stop.seeds, seeds), stop.spending) if stop else ALPHA
    crossed = tuple(axes) if study.design == "product" and len(axes) > 1 else ()
    return PlannedDesign(tuple(tasks.values()), len(study.stated), crossed, alpha)


def deviation_of(pilot: str | None, given: float | None, runs: Path, study: Grid) -> Deviation:
    """The noise of a pilot run, or the one given, or the assumed one.

    Raises:
        UserError: there is no such run, its runs do not repeat, or both were given.
    """
    from klab.grid import UserError
    from klab.reports.inference.power import Noise

    if pilot is not None and given is not None:
        raise UserError("is measured in the pilot run", key="--sd", value=given, hint="Give --sd or --pilot, not both.")
    if given is not None and not 0 < given < float("inf"):
        raise UserError("not a number above 0", key="--sd", value=given)
    if pilot is None:
        sd = ASSUMED_SD if given is None else given
        why = "assumed; --pilot RUN measures it" if given is None else "as given"
        return Deviation(Noise(sd), f"{sd:g} ({why})")
    from klab.harness.cli.arguments import run_of

    opened = run_of(pilot, runs)
    from klab.reports.pilot import measured_noise

    noise, words = measured_noise(opened.path, study.analysis)
    return Deviation(noise, words)


def _warnings(study: Grid, contrast: float | None) -> list[str]:
    seeds, found = len(study.seeds), []
    if len(study.groups) < 2:
        found.append("one configuration: there is nothing to compare")
    elif study.baseline is None:
        found.append("no cell of this grid is the baseline: nothing is compared with it, and no verdict is given")
    if seeds == 1:
        found.append("one seed: no comparison can be decided, whatever the scores are; two seeds are the least")
    elif seeds == 2:
        found.append("two seeds are weak evidence: only very large differences can be told")
    if contrast is not None and contrast > 1:
        found.append("no difference within a reward of range 1 can be told at this number of seeds")
    return found
