"""Main effects and interactions: right on designs whose answer is known, and silent about what a design cannot tell."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from klab.reports.effects import Design, interactions, main_effects

A = {"k1": 0.0, "k2": 0.3, "k3": 0.5}
B = {"loss": 0.0, "reward": -0.2}


def _design(
    rows: list[tuple[str | None, str | None]], seeds: int = 4, noise: float = 0.0, crossed: float = 0.0
) -> Design:
    generator = np.random.default_rng(0)
    shift = generator.normal(size=seeds)
    scores = [
        A.get(a or "k3", 0)
        + B.get(b or "loss", 0)
        + crossed * (a == "k2" and b == "reward")
        + shift
        + noise * generator.normal(size=seeds)
        for a, b in rows
    ]
    values = {"estimator": [a for a, _ in rows], "placement": [b for _, b in rows]}
    return Design(np.asarray(scores), values, {"estimator": "k3", "placement": "loss"})


def test_a_product_gives_back_the_effects_that_made_it() -> None:
    effects = {effect.axis: effect for effect in main_effects(_design(list(product(A, B))))}
    assert {level.value: level.estimate for level in effects["estimator"].levels} == pytest.approx(
        {"k3": 0, "k1": -0.5, "k2": -0.2}
    )
    assert effects["placement"].spread == pytest.approx(0.2)
    assert effects["estimator"].share + effects["placement"].share == pytest.approx(1.0)
    assert effects["estimator"].confounded == ()


def test_one_at_a_time_gives_main_effects_and_no_interaction() -> None:
    rows = [("k3", "loss"), ("k1", "loss"), ("k2", "loss"), ("k3", "reward")]
    effects = main_effects(_design(rows, noise=0.01))
    assert [effect.axis for effect in effects] == ["estimator", "placement"]
    assert effects[0].levels[1].estimate == pytest.approx(-0.5, abs=0.05)
    assert interactions(_design(rows, noise=0.01))[0].freedom == 0


def test_an_interaction_is_found_where_the_design_has_it() -> None:
    found = interactions(_design(list(product(A, B)), noise=0.02, crossed=0.4))[0]
    assert found.freedom == 2
    assert found.p < 1e-4
    absent = interactions(_design(list(product(A, B)), noise=0.02))[0]
    assert absent.p > 0.01


def test_an_unbalanced_design_with_missing_seeds_is_least_squares() -> None:
    design = _design([*product(A, B)][:5], noise=0.1)
    design.scores[1, 2] = np.nan
    cell, seed = np.nonzero(np.isfinite(design.scores))
    a = np.asarray(design.values["estimator"])[cell]
    b = np.asarray(design.values["placement"])[cell]
    x = np.column_stack([*(seed == i for i in range(4)), a == "k1", a == "k2", b == "reward"]).astype(float)
    expected = np.linalg.lstsq(x, design.scores[cell, seed], rcond=None)[0]
    effects = {effect.axis: effect for effect in main_effects(design)}
    assert [level.estimate for level in effects["estimator"].levels[1:]] == pytest.approx(expected[4:6])
    assert effects["placement"].levels[1].estimate == pytest.approx(expected[6])


def test_axes_that_vary_together_are_confounded_and_say_with_what() -> None:
    effects = {effect.axis: effect for effect in main_effects(_design([("k1", "loss"), ("k3", "reward")]))}
    assert effects["estimator"].confounded == ("placement",)
    assert np.isnan(effects["estimator"].levels[1].estimate)
    assert np.isnan(effects["estimator"].p)


def test_an_inactive_axis_counts_as_its_reference() -> None:
    effects = {
        effect.axis: effect for effect in main_effects(_design([("k3", "loss"), ("k1", "loss"), (None, "reward")]))
    }
    assert effects["placement"].levels[1].estimate == pytest.approx(-0.2)
    assert effects["placement"].confounded == ()


def test_equal_scores_have_no_effect_and_p_is_one() -> None:
    design = _design(list(product(A, B)))
    flat = main_effects(design._replace(scores=np.ones_like(design.scores)))
    assert {effect.spread for effect in flat} == {0.0}
    assert {effect.p for effect in flat} == {1.0}


def test_an_axis_without_effect_is_called_one_at_the_nominal_rate() -> None:
    generator = np.random.default_rng(5)
    rows = list(product(A, B))
    values = {"estimator": [a for a, _ in rows], "placement": [b for _, b in rows]}
    p = np.asarray(
        [
            [
                effect.p
                for effect in main_effects(Design(generator.normal(size=(6, 3)) + generator.normal(size=3), values, {}))
            ]
            for _ in range(300)
        ]
    )
    assert 0.025 <= np.mean(p < 0.05) <= 0.08
