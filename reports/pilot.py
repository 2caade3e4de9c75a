"""The noise of a pilot run, from which a study is planned: the variance components of the model that `analyse` fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from klab.grid import UserError
from klab.grid.schema.sections import AnalysisPlan
from klab.grid.score import DEFAULT_SCORE, Score, parse_score
from klab.reports.comparison import run_frame
from klab.reports.inference.contrasts import all_squares, crossed_axes
from klab.reports.inference.design import read_design
from klab.reports.inference.power import Noise
from klab.reports.inference.variance import Components, estimate_components
from klab.reports.scores import run_scores
from klab.reports.study import Study, load_run


def measured_noise(path: Path, plan: AnalysisPlan | None) -> tuple[Noise, str]:
    """The noise of the runs of a pilot, by the score that the new study states, and where it comes from in words.

    Raises:
        UserError: no configuration of the pilot has two seeds with a score.
    """
    study = load_run(path)
    score = parse_score(plan.scores[0] if plan is not None and plan.scores else study.conduct.score or DEFAULT_SCORE)
    return noise_of(study, score)


def noise_of(study: Study, score: Score) -> tuple[Noise, str]:
    """The noise of a study's runs by a score, and where it comes from in words.

    Raises:
        UserError: no configuration has two seeds with a score.
    """
    values = run_scores(study, score)
    variances, freedom = [], 0.0
    components: dict[str, float] = {}
    for task in study.tasks:
        mine = (study.cells["task"] == task).to_numpy()
        frame, baseline = run_frame(study, study.cells[mine], values[mine], study.baselines.get(task))
        design = read_design(frame, baseline, score.higher)
        found = estimate_components(design, crossed_axes(design, all_squares(design)))
        known = found.cell_variance[np.isfinite(found.cell_variance)]
        variances.append(known)
        freedom += float(found.error_freedom.sum())
        for name, deviation in _axes(found, design.axes).items():
            components[name] = max(deviation, components.get(name, 0.0))
    everything = np.concatenate(variances) if variances else np.zeros(0)
    if not everything.size:
        raise UserError(
            "no configuration has two seeds with a score: nothing says how much runs differ",
            file=study.runs[0].path,
            key="--pilot",
            hint="A pilot needs at least two seeds.",
        )
    deviation = float(np.sqrt(everything.mean()))
    shaky = "".join(f"; of {axis} from seed to seed {sd:.2g}" for axis, sd in components.items() if sd > 0)
    words = f"{deviation:.3g} (of the {score.title} in {study.name}, {freedom:g} degrees of freedom{shaky})"
    return Noise(deviation, tuple(components.items())), words


def _axes(found: Components, axes: tuple[str, ...]) -> Mapping[str, float]:
    """Standard deviations of seed × axis, by axis."""
    return {
        axes[each.axis]: float(np.sqrt(each.scale * max(each.mean_square - found.error[each.task], 0.0)))
        for each in found.axes
    }
