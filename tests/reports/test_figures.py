"""Figures: what shades and colours mean, where labels stand, and that everything fits a column."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from klab.reports import Study
from klab.reports.comparison import compare
from klab.reports.figures import draw
from klab.reports.figures.labels import label_points
from klab.reports.figures.profiles import across_tasks, profile
from klab.reports.figures.stability import SIGNS, shade
from klab.reports.figures.style import COLUMN, canvas, styled
from klab.reports.gradients import own_drift

places = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12)


@settings(max_examples=12)
@given(places)
def test_labels_cover_no_point_no_bar_and_no_other_label(points: list[tuple[float, float]]) -> None:
    with styled():
        figure, (axes,) = canvas(COLUMN, 2.5)
        x, y = [point[0] for point in points], [point[1] for point in points]
        axes.plot(x, y, "o")
        bars = [(x[0], y[0] - 0.2, x[0], y[0] + 0.2)]
        axes.plot([x[0], x[0]], [y[0] - 0.2, y[0] + 0.2])
        done = label_points(figure, axes, x, y, [f"a cell {i}" for i in range(len(x))], first=[0], bars=bars)
        figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(done)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    frame = axes.get_window_extent()
    at = axes.transData.transform(points)
    column = axes.transData.transform([(x[0], y[0] - 0.2), (x[0], y[0] + 0.2)])
    for box in boxes:
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        assert not any(box.contains(*point) for point in at)
        crossed = box.x0 <= column[0][0] <= box.x1 and box.y0 <= column[1][1] and column[0][1] <= box.y1
        assert not crossed


def test_a_healthy_study_has_no_shade_however_its_cells_differ() -> None:
    healthy = {
        "lost": [0, 0, 0],
        "gradient_spikes": [0, 1, 2],
        "reverse_kl_max": [0.2, 0.3, 0.8],
        "ess_min": [0.35, 0.9, 1.0],
        "clip_fraction": [0.0, 0.1, 0.2],
        "entropy": [0.1, 0.5, 2.0],
        "informative_groups": [0.3, 0.5, 1.0],
        "collapse_update": [np.nan] * 3,
    }
    for sign in SIGNS:
        assert not np.nan_to_num(shade(np.array(healthy[sign.name], dtype=float), sign)).any(), sign.name


@pytest.mark.parametrize(
    ("name", "values", "shades"),
    [
        ("lost", [0, 1, 2, 5], [0, 0.5, 1, 1]),
        ("collapse_update", [np.nan, 12], [np.nan, 1]),
        ("ess_min", [0.5, 0.3, 0.3 / 10**0.5, 0.03, 0.0], [0, 0, 0.5, 1, 1]),
        ("reverse_kl_max", [1, 1, 1, 3, 30], [0, 0, 0, 0, 1]),
    ],
)
def test_a_warning_darkens_with_its_size(name: str, values: list[float], shades: list[float]) -> None:
    sign = next(sign for sign in SIGNS if sign.name == name)
    assert shade(np.array(values, dtype=float), sign) == pytest.approx(shades, nan_ok=True)


def test_bands_of_profiles_are_wilsons_and_tasks_count_alike() -> None:
    runs = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    found = profile([runs], np.array([0.0, 0.25, 0.6]))
    assert found.share == pytest.approx([1.0, 0.6, 0.0])
    for i, count in enumerate((5, 3, 0)):
        expected = stats.binomtest(count, 5).proportion_ci(method="wilson")
        assert (found.low[i], found.high[i]) == pytest.approx((expected.low, expected.high))
    uneven = profile([runs, np.array([1.0, 1.0])], np.array([0.35]))
    assert uneven.share == pytest.approx([(0.4 + 1.0) / 2])
    assert uneven.runs == 7
    even = profile([runs, runs], np.array([0.25]))
    assert even.low == pytest.approx([stats.binomtest(6, 10).proportion_ci(method="wilson").low])


def test_tasks_with_different_numbers_of_runs_are_put_together_without_losing_any(study: Study) -> None:
    whole = compare(study, study.tasks[0])
    fewer = replace(whole, task="other", scores=np.where(np.arange(len(whole.seeds)) < 2, whole.scores + 0.1, np.nan))
    table, runs = across_tasks([whole, fewer])
    row = table.set_index("label").loc["baseline"]
    place = whole.groups.index(whole.baseline or "")
    own = whole.scores[place]
    assert [len(each) for each in runs["baseline"]] == [own.size, 2]
    assert row["runs"] == own.size + 2
    assert row["mean"] == pytest.approx((own.mean() + own[:2].mean() + 0.1) / 2)
    weighted = np.concatenate([np.repeat(own, 2), np.repeat(own[:2] + 0.1, 5)])
    assert row["iqm"] == pytest.approx(stats.trim_mean(weighted, 0.25))


def test_the_plane_shows_the_drift_of_the_cells_own_updates() -> None:
    rows = [("a", "on-policy", 1.0), ("a", "4 updates", 2.0), ("a", "16 updates", 3.0), ("a", "random 0.3", 4.0)]
    rows += [("b", "random 0.3", 6.0), ("b", "on-policy", 5.0)]
    found = own_drift(pd.DataFrame(rows, columns=["group", "drift", "bias"]))
    assert found["bias"].to_dict() == {"a": 3.0, "b": 5.0}
    assert found["drift"].to_dict() == {"a": "16 updates", "b": "on-policy"}


def test_every_figure_fits_a_column_with_legible_labels_and_says_n(study: Study) -> None:
    names = {label: f"reward_to_go, {label}, abs" for label in study.cells["label"]}
    long = replace(study, cells=study.cells.assign(label=study.cells["label"].map(names)))
    comparison = compare(long, long.tasks[0])
    drawings = draw(long, comparison)
    assert len({drawing.name for drawing in drawings}) == len(drawings)
    for drawing in drawings:
        drawn = drawing.figure.get_tightbbox()
        width, height = drawing.figure.get_size_inches()
        assert width <= 3.4, drawing.name
        assert height <= 9, drawing.name
        assert drawn.x0 > -0.03, drawing.name
        assert drawn.x1 < width + 0.03, drawing.name
        texts = [text for axes in drawing.figure.axes for text in [*axes.texts, *axes.get_xticklabels(), axes.title]]
        assert min(text.get_fontsize() for text in texts) >= 5.5, drawing.name
        legends = [text.get_text() for legend in drawing.figure.legends for text in legend.get_texts()]
        assert "n = " in " ".join([drawing.caption, *legends]), drawing.name
