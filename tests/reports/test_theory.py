"""How well the exact lab's numbers predict the scores of a study."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from klab.reports import Study, render
from klab.reports.comparison import Comparison, compare
from klab.reports.figures import draw
from klab.reports.figures.theory import theory_plot
from klab.reports.gradients import own_drift
from klab.reports.theory import PREDICTORS, predictors, theory_words


@pytest.fixture
def comparison(study: Study) -> Comparison:
    return compare(study, study.tasks[0])


def lab(comparison: Comparison, **numbers: np.ndarray) -> pd.DataFrame:
    """A row per configuration after the drift of training, and misleading ones of other drifts."""
    groups = comparison.table["group"].tolist()
    rows = pd.DataFrame(
        {"group": groups, "drift": "as trained", "cosine": 1.0, "variance": 1.0, "bias": 1.0, **numbers}
    )
    others = [rows.assign(drift=drift, bias=np.arange(len(groups))) for drift in ("on-policy", "4 updates")]
    return pd.concat([rows, *others], ignore_index=True)


def test_the_correlation_is_that_of_the_drift_that_training_showed(comparison: Comparison) -> None:
    table = comparison.table
    known = np.isfinite(table["mean"].to_numpy())
    noise = np.random.default_rng(0).normal(0, 0.05, len(table))
    bias = 1.0 - table["mean"].fillna(0.0).to_numpy() + noise
    found = predictors(comparison, lab(comparison, bias=bias))
    assert [each.name for each in found] == ["bias"], "what does not vary over cells predicts nothing"
    (best,) = found
    assert best.cells == known.sum()
    assert best.correlation == pytest.approx(stats.spearmanr(bias[known], table["mean"][known]).statistic)
    half = stats.norm.ppf(0.5 + 0.95**0.2 / 2) * np.sqrt((1 + best.correlation**2 / 2) / (best.cells - 3))
    assert np.arctanh(best.low) == pytest.approx(np.arctanh(best.correlation) - half)
    assert "relative bias predicts the ranks" in theory_words(found)
    assert best.missed[0] in theory_words(found)
    drawing = theory_plot(comparison, found)
    assert drawing is not None
    assert f"over n = {best.cells} cells" in drawing.caption


def test_no_relation_is_not_called_one(comparison: Comparison) -> None:
    bias = np.random.default_rng(4).permutation(len(comparison.table)).astype(float)
    found = predictors(comparison, lab(comparison, bias=bias))
    assert found[0].low < 0 < found[0].high
    assert theory_words(found).startswith("No number of the exact lab is seen to predict the ranks")
    assert predictors(comparison, None) == []
    assert theory_words([]) == ""


def test_the_drift_of_training_comes_before_fixed_numbers_of_updates(comparison: Comparison) -> None:
    own = own_drift(lab(comparison))
    assert set(own["drift"]) == {"as trained"}
    assert own.index.is_unique


@pytest.mark.parametrize("names", [*([name] for name in PREDICTORS), list(PREDICTORS)])
def test_every_word_of_the_figure_is_inside_it(study: Study, comparison: Comparison, names: list[str]) -> None:
    order = np.random.default_rng(1).permutation(len(comparison.table)).astype(float)
    drawings = draw(study, comparison, lab(comparison, **({"bias": 1.0} | dict.fromkeys(names, order))))
    (drawing,) = (each for each in drawings if each.name == "theory")
    words = drawing.figure.get_tightbbox()
    width, height = drawing.figure.get_size_inches()
    assert min(words.x0, words.y0) > -0.02
    assert words.x1 < width + 0.02
    assert words.y1 < height + 0.02


def test_the_page_has_the_sentence_and_the_figure(study: Study, comparison: Comparison, tmp_path) -> None:
    bias = 1.0 - comparison.table["mean"].fillna(0.0).to_numpy()
    page = render([run.path for run in study.runs], tmp_path, gradients=lab(comparison, bias=bias)).read_text()
    assert "Which number of the lab predicts the score?" in page
    assert "predicts the ranks of the" in page
