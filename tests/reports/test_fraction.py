"""What is inferred from a fractional design."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from klab.grid.fractional import FractionalDesign, choose
from klab.reports import load_run, render
from klab.reports.comparison import compare
from klab.reports.fraction_words import resolution_words
from klab.reports.inference import analyse
from klab.reports.inference.factorial import model_of, resolution
from klab.reports.inference.fraction import rank_correlation
from klab.reports.tables import to_json
from tests.reports.synthetic import write_run

LEVELS, NAMES = (4, 3, 3, 2), ("a", "b", "c", "d")
CODES = list(itertools.product(*map(range, LEVELS)))
FITTED, HELD = choose(CODES, FractionalDesign(52, 10), 0)
BASELINE = dict.fromkeys(NAMES, "v0")


def values(code):
    return {name: f"v{number}" for name, number in zip(NAMES, code, strict=True)}


def runs(score, seeds, order=FITTED + HELD):
    """A row per run of every chosen cell; ``score(code, seed)``."""
    rows = [
        {**values(CODES[index]), "seed": seed, "state": "finished", "score": score(CODES[index], seed)}
        for index in order
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows)


def fitted(score, seeds=3, **options):
    return analyse(runs(score, seeds), BASELINE, held_out=[values(CODES[index]) for index in HELD], **options)


def test_a_noiseless_model_is_recovered_and_predicts_what_it_never_saw():
    def score(code, seed):
        a, b, c, d = code
        return 0.1 * a + 0.2 * (b == 1) + 0.3 * (a == 2) * (d == 1) + 0.01 * c + 0.05 * seed

    found = fitted(score)
    cells = found.fit.cells
    assert cells["held_out"].sum() == 10
    np.testing.assert_allclose(cells["predicted"], cells["observed"], atol=1e-12)
    quality = found.fit.predictions.set_index("model")
    assert quality.loc["axes and pairs", "r2"] == pytest.approx(1.0)
    assert quality.loc["axes", "r2"] < 0.99
    shares = found.fit.terms.set_index(["axis", "other"])["share"]
    assert shares[("a", "d")] > 0.1
    assert shares[("b", "c")] == pytest.approx(0.0, abs=1e-9)
    levels = found.levels.set_index(["axis", "value"])["difference"]
    assert levels[("b", "v1")] == pytest.approx(0.2)
    assert levels[("a", "v2")] == pytest.approx(0.2 + 0.3 / 2), "the mean over both values of d"
    pair = found.interactions.set_index(["axis", "other"]).loc[("a", "d")]
    assert (pair["value"], pair["other_value"]) == ("v2", "v1")
    assert pair["difference"] == pytest.approx(0.3)


def test_estimates_and_tests_are_those_of_least_squares_with_dummy_variables():
    rng = np.random.default_rng(3)
    noise = {index: rng.normal(size=3) for index in range(len(CODES))}
    found = fitted(lambda code, seed: 0.4 * code[0] + noise[CODES.index(code)][seed])
    mean = np.asarray([0.4 * CODES[i][0] + noise[i].mean() for i in FITTED])
    codes = np.asarray([CODES[i] for i in FITTED])

    def dummies(*axes):
        columns = [np.ones(len(codes))]
        for value in itertools.product(*(range(1, LEVELS[axis]) for axis in axes)):
            columns.append(np.all(codes[:, list(axes)] == value, axis=1).astype(float))
        return np.column_stack(columns)[:, 1:]

    main = {axis: dummies(axis) for axis in range(4)}
    pairs = {pair: dummies(*pair) for pair in itertools.combinations(range(4), 2)}
    constant = np.ones((len(codes), 1))

    def residual(parts):
        matrix = np.hstack([constant, *parts])
        coefficients, *_ = np.linalg.lstsq(matrix, mean, rcond=None)
        return float(np.sum((mean - matrix @ coefficients) ** 2)), int(np.linalg.matrix_rank(matrix))

    everything, columns = residual([*main.values(), *pairs.values()])
    error = everything / (len(codes) - columns)
    terms = found.fit.terms.set_index(["axis", "other"])
    without, _ = residual([*main.values(), *(part for pair, part in pairs.items() if pair != (0, 3))])
    assert terms.loc[("a", "d"), "F"] == pytest.approx((without - everything) / 3 / error)
    respecting = [*main.values(), *(part for pair, part in pairs.items() if 0 not in pair)]
    full, _ = residual(respecting)
    reduced, _ = residual(respecting[1:])
    ratio = (reduced - full) / 3 / error
    row = terms.loc[("a", None)]
    assert row["F"] == pytest.approx(ratio)
    assert row["p"] == pytest.approx(stats.f.sf(ratio, 3, len(codes) - columns))


def test_nothing_differs_by_chance_when_axes_act_otherwise_in_every_seed_and_cells_have_effects_of_their_own():
    rng = np.random.default_rng(11)
    wrong = 0
    for _ in range(30):
        seeds = rng.normal(0, 0.7, (4, 4, 3))
        own, noise = rng.normal(0, 0.5, len(CODES)), rng.normal(0, 1, (len(CODES), 3))

        def score(code, seed, seeds=seeds, own=own, noise=noise):
            index = CODES.index(code)
            return own[index] + noise[index, seed] + sum(seeds[axis, v, seed] for axis, v in enumerate(code))

        found = fitted(score)
        wrong += bool(
            (found.effects["verdict"] == "differs").any() or (found.interactions["verdict"] == "differs").any()
        )
    assert wrong <= 3, "P(more than 3 of 30 at 0.0225, the share of effects and interactions) is below 0.005"


def test_a_large_effect_is_found_with_three_seeds():
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.03, (len(CODES), 3))
    found = fitted(lambda code, seed: 0.2 * (code[1] == 2) + noise[CODES.index(code), seed])
    effects = found.effects.set_index("axis")
    assert effects.loc["b", "verdict"] == "differs"
    assert effects.loc["b", "value"] == "v2"
    assert effects.loc["b", "low"] < 0.2 < effects.loc["b", "high"]
    assert "b (v2 against v0" in found.headline


def test_effects_need_no_baseline_cell_only_a_value_to_count_from():
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.03, (len(CODES), 3))
    absent = next(code for code in CODES if CODES.index(code) not in FITTED + HELD and code[1] != 2)
    frame = runs(lambda code, seed: 0.2 * (code[1] == 2) + noise[CODES.index(code), seed], 3)
    found = analyse(frame, values(absent), held_out=[values(CODES[index]) for index in HELD])
    effects = found.effects.set_index("axis")
    assert (effects.loc["b", "verdict"], effects.loc["b", "value"]) == ("differs", "v2")
    assert effects.loc["b", "low"] < 0.2 < effects.loc["b", "high"]
    assert found.headline.startswith(f"b (v2 against v{absent[1]}")
    assert not np.isfinite(found.contrasts["difference"]).any()
    assert any(note.startswith("No cell with a score is the baseline") for note in found.notes)
    flat = analyse(runs(lambda code, seed: noise[CODES.index(code), seed], 3), values(absent), held_out=[])
    assert flat.headline.startswith("No effect of an axis or of a pair of axes can be told")
    single = analyse(runs(lambda code, seed: float(code[0]), 1), values(absent), held_out=[])
    assert single.headline.startswith("One seed per cell")


def test_a_fraction_without_its_baseline_counts_from_the_first_values(tmp_path):
    run = write_run(tmp_path / "fraction", GRID.replace("lr: 3.0e-4}", "lr: 2.0e-4}", 1), noise=0.005)
    study = load_run(run.path)
    assert study.baselines == {}
    found = compare(study, study.tasks[0]).analysis
    assert {row["axis"] for row in found.effects.to_dict("records")} == {axis.key for axis in study.axes}
    assert (found.effects["verdict"] == "differs").any()


def test_one_seed_gives_estimates_and_no_verdict():
    found = fitted(lambda code, seed: float(code[0]), seeds=1)
    assert set(found.effects["verdict"]) == {"undecided"}
    assert found.headline.startswith("One seed per cell")


def test_crashed_runs_leave_the_estimates_where_they_were():
    def score(code, seed):
        return 0.1 * code[0] + 0.5 * seed

    frame = runs(score, 3)
    frame.loc[[4, 40, 41], "state"] = "failed"
    frame.loc[[4, 40, 41], "score"] = np.nan
    found = analyse(frame, BASELINE, held_out=[values(CODES[index]) for index in HELD])
    levels = found.levels.set_index(["axis", "value"])["difference"]
    assert levels[("a", "v3")] == pytest.approx(0.3, abs=1e-9), "seeds have levels of their own, which are taken off"
    assert levels[("b", "v1")] == pytest.approx(0.0, abs=1e-9)


def test_too_few_cells_for_pairs_are_said_to_be():
    few, _ = choose(CODES, FractionalDesign(24), 0)
    found = resolution(np.asarray(CODES)[few], LEVELS)
    assert found.fits_main
    assert not found.fits_pairs
    assert found.pairs == 1 + 3 + 2 + 2 + 1 + 6 + 6 + 3 + 4 + 2 + 2
    text = resolution_words(found, NAMES, len(CODES))
    assert "those of pairs cannot: that takes 42 cells" in text
    assert "Too few" in resolution_words(resolution(np.asarray(CODES)[few[:12]], LEVELS), NAMES, len(CODES))


def test_the_whole_product_has_efficiency_1_and_no_alias():
    found = resolution(np.asarray(CODES), LEVELS)
    assert found.efficiency == pytest.approx(1.0)
    assert found.alias == pytest.approx(0.0, abs=1e-9)
    model = model_of(np.asarray(CODES), LEVELS, True)
    np.testing.assert_allclose(model.matrix.T @ model.matrix / len(CODES), np.eye(model.columns), atol=1e-12)
    np.testing.assert_allclose(model.row(CODES[17]), model.matrix[17])


def test_rank_correlation_is_scipys_with_bonett_and_wrights_interval():
    rng = np.random.default_rng(0)
    first = rng.normal(size=30)
    second = first + rng.normal(size=30)
    rho, low, high = rank_correlation(first, second)
    assert rho == pytest.approx(stats.spearmanr(first, second).statistic)
    half = 1.959964 * np.sqrt((1 + rho**2 / 2) / 27)
    assert (np.arctanh(low), np.arctanh(high)) == pytest.approx((np.arctanh(rho) - half, np.arctanh(rho) + half))
    assert np.isnan(rank_correlation(first, np.zeros(30))).all()


GRID = """
name: fraction
description: A fraction of a product.
task: {name: addition, digits: 2}
policy: {name: tiny}
training: {updates: 20, prompts: 16, group_size: 8, updates_per_rollout: 2, lr: 3.0e-4}
objective: {algorithm: grpo, beta: 0.05}
design: {name: fractional, cells: 40, holdout: 8}
axes:
  estimator: [k3, k1, k2]
  placement: [loss, reward, advantage]
  weight: [ppo_clip, {name: power, q: 0.5}, truncate]
  training.lr: [3.0e-4, 1.0e-4]
seeds: 3
"""


def test_the_page_of_a_fraction(tmp_path):
    run = write_run(tmp_path / "fraction", GRID, noise=0.005)
    study = load_run(run.path)
    assert len(study.held_out) == 8
    assert study.candidates == 54
    fit = compare(study, study.tasks[0]).analysis.fit
    cells = compare(study, study.tasks[0]).groups
    assert {cells[i] for i in fit.cells.loc[fit.cells["held_out"], "cell"]} == study.held_out
    page = render(run.path, tmp_path / "out").read_text(encoding="utf-8")
    assert "A fraction: effects are estimated from 40 of 54 combinations." in page
    assert "8 cells were held out and predicted." in page
    assert "Do the effects of axes predict a cell?" in page
    assert "whether axes act together cannot be seen here" not in page
    terms = pd.read_csv(tmp_path / "out" / "tables" / "terms.csv")
    assert terms.sort_values("share")["axis"].iloc[-1] == "training.lr"
    assert len(terms) == 4 + 6
    predictions = pd.read_csv(tmp_path / "out" / "tables" / "predictions.csv")
    assert predictions["rank_correlation"].min() > 0.8
    data = json.loads(to_json([compare(study, study.tasks[0])]))["comparisons"][0]["fit"]
    assert data["resolution"]["cells"] == 40
    assert len(data["terms"]) == 10
    assert (tmp_path / "out" / "figures" / "prediction.svg").is_file()
