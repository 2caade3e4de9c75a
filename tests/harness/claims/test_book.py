"""The numbers of the book of claims, and the verdicts that follow from them."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch

from klab.harness.claims.advantages import binomial, enumerated_factor, group_factor
from klab.harness.claims.book import book
from klab.harness.claims.claim import Finding, Verdict
from klab.harness.claims.credit import end_symbol_failure
from klab.harness.claims.documents import log_ratio_runs
from klab.harness.claims.drift import random_drift
from klab.harness.claims.estimator_values import crossing, rao_blackwell, rao_blackwell_counterexample
from klab.harness.claims.fixed_points import PLACEMENTS, rest, trained
from klab.harness.claims.instances import Setting, cosine, relative
from klab.harness.claims.kl_gradients import (
    autograd_samples,
    bernoulli_derivatives,
    decisive_first_action,
    reverse_kl_gradient,
    sequences,
    worked,
)
from klab.harness.claims.moving_references import distance, train

OVERTURNED = {"C21b": Verdict.OVERCLAIMED}
"""Claims whose examination comes out otherwise than the record has it."""

MISPRINTED = {
    ("C23", "beta 2: 1 - p, k3-loss, group std"): 0.55132,
    ("C44", "c_G(p), p = 0.01, G = 4"): 1.72746,
}
"""Numbers that the book rounds wrongly, with the right ones."""


@lru_cache(maxsize=1)
def findings() -> dict[str, Finding]:
    return {one.id: one.examined() for one in book().values()}


@pytest.mark.parametrize("identifier", list(book()))
def test_the_verdict_is_the_one_on_record(identifier: str) -> None:
    finding = findings()[identifier]
    if identifier in OVERTURNED:
        assert finding.verdict == OVERTURNED[identifier]
    else:
        assert finding.as_expected, [check for check in finding.checks if not check.holds]


def test_every_printed_number_is_reproduced_but_two_roundings() -> None:
    differing = {
        (one.claim.id, number.name): number.value for one in findings().values() for number in one.disagreements
    }
    assert differing.keys() == MISPRINTED.keys()
    for name, value in MISPRINTED.items():
        assert differing[name] == pytest.approx(value, abs=5e-6)


def test_undecided_claims_say_what_would_decide_them() -> None:
    undecided = [one for one in findings().values() if one.verdict == Verdict.UNDECIDED]
    assert undecided
    assert all(one.remarks for one in undecided)


def test_the_bernoulli_numbers() -> None:
    derivatives = bernoulli_derivatives()
    expected = {
        "k1 in reward": math.log(4),
        "k1 as loss": 0.0,
        "k2 as loss": math.log(4),
        "k3 as loss": 1.875,
        "k3 in reward": math.log(4) - 1.875,
        "k2 in reward": (math.log(1.6) ** 2 - math.log(0.4) ** 2) / 2,
    }
    assert derivatives == pytest.approx(expected, abs=1e-14)


def test_schulmans_table_to_three_digits() -> None:
    values = {number.name: number.value for number in findings()["C01"].numbers}
    table = {
        "KL 0.005: bias k2/KL": 0.0025,
        "KL 0.005: std k1/KL": 20.0,
        "KL 0.005: std k2/KL": 1.4177,
        "KL 0.005: std k3/KL": 1.4166,
        "KL 0.5: bias k2/KL": 0.25,
        "KL 0.5: std k1/KL": 2.0,
        "KL 0.5: std k2/KL": 1.7321,
        "KL 0.5: std k3/KL": 1.6950,
    }
    for name, printed in table.items():
        assert values[name] == pytest.approx(printed, rel=5e-5), name
    assert values["KL 0.5: bias k1/KL"] == pytest.approx(0, abs=1e-9)
    assert values["KL 0.5: bias k3/KL"] == pytest.approx(0, abs=1e-9)


def test_k1_and_k3_have_the_same_variance_at_628_millinats() -> None:
    m = 2 * crossing()
    assert math.exp(m) == pytest.approx(1 + 2 * m, rel=1e-12)
    assert crossing() == pytest.approx(0.62822, abs=1e-5)


def test_rao_blackwell_loses_on_the_counterexample() -> None:
    found = rao_blackwell(rao_blackwell_counterexample())
    assert found["Monte Carlo"] == pytest.approx((2.39545, 3.31591), abs=1e-5)
    assert found["Rao-Blackwell"] == pytest.approx((2.39545, 5.06974), abs=1e-5)


def test_k2_loss_is_k1_reward_for_a_whole_sequence_and_not_per_token() -> None:
    setting = sequences(1)[0]
    whole = setting.samples(setting.kappa.sum(1, keepdim=True).expand_as(setting.mask))
    assert torch.allclose(autograd_samples(setting, "sequence k2"), whole, rtol=0, atol=1e-14)
    assert relative(setting.mean(setting.kappa), reverse_kl_gradient(setting)) > 0.1
    fixture = decisive_first_action()
    truth = reverse_kl_gradient(fixture).reshape(3, 2)[0]
    assert truth.tolist() == pytest.approx([-0.5, 0.5], abs=1e-12)
    assert fixture.mean(fixture.kappa).reshape(3, 2)[0].tolist() == [0.0, 0.0]


def test_the_corrected_k3_is_the_reweighted_k2_sample_by_sample() -> None:
    finding = findings()["C18"]
    assert finding.value("rho k3 against sg(rho) k2, sample by sample") < 1e-12
    assert finding.value("E_old of rho k3: relative error to grad KL(pi || ref)") < 1e-12
    assert finding.value("E_old of sg(rho) k3: relative error to grad KL(ref || pi)") < 1e-12


@pytest.mark.parametrize("size", [0.1, 0.3, 1.0])
def test_the_order_of_the_ratios_by_bias(size: float) -> None:
    bias = {name: quality.bias for name, quality in random_drift(size, baseline=True).quality.items()}
    assert bias["full product"] < 1e-12
    assert bias["full product, q = .5"] < min(bias["prefix product"], bias["future product"])
    assert max(bias["prefix product"], bias["future product"]) < min(bias["GSPO mean"], bias["future mean"])
    assert bias["GSPO mean"] == pytest.approx(bias["future mean"], rel=0.01)
    assert max(bias["GSPO mean"], bias["future mean"]) < bias["token"] < bias["none"] < bias["PPO clip .2"]


def test_without_a_baseline_the_geometric_means_are_worse_than_the_token_ratio() -> None:
    bias = {name: quality.bias for name, quality in random_drift(0.3).quality.items()}
    assert bias["token"] < bias["future mean"] < bias["GSPO mean"] < bias["none"]


def test_the_unbiased_weight_can_have_no_variance() -> None:
    finding = findings()["C35"]
    assert finding.value("A (1,-1), q = 1: variance of a sample's gradient") < 1e-30
    assert finding.value("A (1,-1), q = 0: variance of a sample's gradient") == pytest.approx(0.16)
    assert finding.value("A (1,-1), q = 1: expected gradient") == pytest.approx(0.18)


def test_an_end_symbol_breaks_the_causal_form_under_a_mean() -> None:
    exact, causal = end_symbol_failure(0)
    assert cosine(causal, exact) < 0.95
    assert relative(causal, exact) > 0.2


def test_bandits_with_moving_references_come_to_rest_where_the_formulas_say() -> None:
    fixed, reference = train("fixed", 0.5, 4_000)
    tilted = [0.1 * math.exp(2), 0.3 * math.exp(1.2), 0.6]
    assert fixed.tolist() == pytest.approx([each / sum(tilted) for each in tilted], rel=1e-9)
    assert reference.tolist() == pytest.approx([0.1, 0.3, 0.6], rel=1e-12)
    reset, followed = train("reset every update", 0.5, 4_000)
    assert distance(reset, followed) == 0.0
    assert 1 - reset[0] < 1e-3
    trailing, behind = train("ema 0.99", 0.5, 4_000)
    assert 1 - reset[0] < 1 - trailing[0] < 1 - fixed[0]
    assert 0 < distance(trailing, behind) < 1e-2


def test_grpos_factor_by_three_ways() -> None:
    assert [round(group_factor(group, 0.5), 3) for group in (2, 4, 8, 16)] == [1.0, 1.616, 1.856, 1.934]
    assert [round(group_factor(group, 0.1), 3) for group in (2, 4, 8, 16)] == [1.0, 1.690, 2.328, 2.848]
    assert [round(group_factor(group, 0.01), 3) for group in (2, 4, 8, 16)] == [1.0, 1.727, 2.609, 3.733]
    assert enumerated_factor(4, 0.01, "group_norm") == pytest.approx(group_factor(4, 0.01), rel=1e-12)
    counts = torch.arange(5, dtype=torch.float64)
    spread = (counts / 4 * (1 - counts / 4)).sqrt()  # E[std_G] / (p (1-p)), the third way
    assert float(binomial(4, 0.01) @ spread) / (0.01 * 0.99) == pytest.approx(group_factor(4, 0.01), rel=1e-12)


def test_log_ratio_training_is_bit_identical_to_training_without_a_reference() -> None:
    with_reference, without, shift = log_ratio_runs(updates=50)
    assert all(torch.equal(left, right) for left, right in zip(with_reference, without, strict=True))
    assert max(map(abs, shift)) > 1e-3


def test_training_a_bandit_ends_at_the_fixed_points() -> None:
    assert trained(PLACEMENTS[1], 0.5) == pytest.approx(rest(PLACEMENTS[1], 0.5)[-1], rel=1e-6)
    assert rest(PLACEMENTS[2], 2.0)[-1] == pytest.approx(0.5513199, abs=1e-6)
    assert rest(PLACEMENTS[3], 0.5) == []


def test_the_helpers_agree_with_autograd_on_a_policy_with_an_end_symbol() -> None:
    setting = Setting.random(3, 3, 4, end=1)
    total = setting.kappa.sum(1, keepdim=True).expand_as(setting.mask)
    assert relative(setting.mean(total), reverse_kl_gradient(setting)) < 1e-12
    assert worked().scores.shape == (4, 1, 4)
