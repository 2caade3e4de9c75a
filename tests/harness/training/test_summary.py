"""What a cell came to, from rows written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from klab.harness.training.summary import SPIKE, collapse, gradient_spikes, summarize, trailing_mean


def row(update: int, reward: float | None, **more: Any) -> dict[str, Any]:
    plain = {"update": update, "reward_mean": reward, "reward_std": 0.1, "nonfinite": reward is None, "tokens": 10}
    return {**plain, "gradient_norm": 1.0, "ess": 0.9, "seconds_step": 0.5, **more}


def evaluation(update: int, accuracy: float, kl: float | None) -> dict[str, Any]:
    return {"update": update, "accuracy": accuracy, "reverse_kl": kl, "parts": {"format": accuracy}, "seconds": 2.0}


def test_final_reward_is_the_mean_of_the_last_tenth() -> None:
    found = summarize(20, [row(u, u / 20) for u in range(1, 21)], [])
    assert found["reward_final"] == pytest.approx((19 / 20 + 1) / 2)
    assert found["gap"] == 0.0


def test_the_gap_is_best_minus_final() -> None:
    found = summarize(4, [row(1, 0.2), row(2, 0.8), row(3, 0.6), row(4, 0.5)], [])
    assert (found["reward_best"], found["reward_final"]) == (0.8, 0.5)
    assert found["gap"] == pytest.approx(0.3)


def test_counts_and_extremes() -> None:
    rows = [row(1, 0.5, ess=0.7), row(2, None, ess=None), row(3, 0.5, tokens=7)]
    found = summarize(3, rows, [evaluation(0, 0.3, 0.0), evaluation(2, 0.6, 1.5), evaluation(3, 0.4, None)], True)
    assert found["state"] == "diverged"
    assert found["updates"] == 3
    assert found["nonfinite_updates"] == 1
    assert found["ess_min"] == 0.7
    assert found["tokens"] == 27
    assert found["seconds"] == 7.5
    assert (found["accuracy_final"], found["accuracy_best"]) == (0.4, 0.6)
    assert (found["reverse_kl_final"], found["reverse_kl_max"]) == (None, 1.5)
    assert found["parts"] == {"format": 0.4}


def test_a_cell_whose_every_reward_is_nan_has_no_reward() -> None:
    found = summarize(10, [row(u, None) for u in range(1, 11)], [])
    assert found["state"] == "diverged"
    assert found["reward_final"] is None
    assert found["gap"] is None
    assert not found["collapsed"]


@pytest.mark.parametrize(
    ("last", "why"),
    [
        ([row(1, 0.5), row(2, None), row(3, None)], "rewards are not finite (NaN or infinite), 2 updates in a row"),
        ([row(1, 0.5, nonfinite=True, loss=None)], "the loss is not finite (NaN or infinite), 1 update in a row"),
        (
            [row(1, 0.5, nonfinite=True, loss=0.1, gradient_norm=None)],
            "the gradient is not finite (NaN or infinite), 1 update in a row",
        ),
        ([row(1, 0.5)], "weights are not finite"),
    ],
)
def test_a_cell_that_diverged_says_why(last: list[dict[str, Any]], why: str) -> None:
    assert summarize(10, last, [], diverged=True)["reason"] == why
    assert summarize(10, [row(1, 0.5)], [])["reason"] is None


def test_trailing_mean_skips_unknown_values() -> None:
    assert trailing_mean([1.0, None, 3.0, None, None], 2) == [1.0, 1.0, 3.0, 3.0, None]


def test_a_fall_below_half_of_the_best_that_lasts_is_a_collapse() -> None:
    assert collapse([0.4, 0.8, 0.3, 0.6, 0.3, 0.1], [0.3] * 6) == 4


def test_a_recovered_fall_is_none() -> None:
    assert collapse([0.8, 0.1, 0.5], [0.3] * 3) is None


def test_noise_around_a_negative_reward_is_no_collapse() -> None:
    assert collapse([-1.0, -0.97, -1.02], [0.4] * 3) is None


def test_a_lasting_fall_of_a_negative_reward_is_a_collapse() -> None:
    assert collapse([-5.0, -1.0, -4.0, -4.5], [0.4] * 4) == 2


def test_a_reward_that_is_always_zero_has_not_collapsed() -> None:
    assert collapse([0.0, 0.0], [0.0, 0.0]) is None


def test_a_gradient_far_above_the_median_before_it_is_a_spike() -> None:
    calm = [1.0, 1.1, 0.9, 1.0, 1.0]
    assert gradient_spikes([*calm, SPIKE * 1.01, 1.0]) == 1
    assert gradient_spikes([*calm, SPIKE * 0.99, None]) == 0
    assert gradient_spikes([*calm[:4], 100.0]) == 0, "too few before it to say"


def test_a_cell_whose_every_gradient_was_zero_is_marked() -> None:
    still = [row(u, 0.5, gradient_norm=0.0) for u in (1, 2)]
    assert summarize(2, still, [])["zero_gradient"] is True
    assert summarize(2, [still[0], row(2, 0.5, gradient_norm=1e-9)], [])["zero_gradient"] is False
    assert summarize(2, [still[0], row(2, None, gradient_norm=None)], [])["zero_gradient"] is False
    assert summarize(2, [], [])["zero_gradient"] is False
