"""Advantage modes on small updates, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from klab.grid import Objective
from klab.grid.catalogue import AXES
from klab.harness.objective import TokenBatch, update_context
from tests.support.random_batches import tokens

CENTRED = (
    "group_norm", "group_center", "leave_one_out", "group_center_batch_norm", "batch_norm", "position_norm",
    "position_center", "length_baseline",
)  # fmt: skip


def _advantages(batch: TokenBatch, advantage: str, **settings: Any) -> list[list[float]]:
    objective = Objective(advantage=advantage, **{"placement": "none"} | settings)
    return update_context(objective, batch).advantages.tolist()


RETURNS = 1.5**0.5  # standard deviation of the returns 3, 0, 0, 1
TOKENS = (65 / 36) ** 0.5  # and of the tokens' 3, 3, 0, 0, 0, 1; their mean is 7/6

RAGGED = tokens(
    [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
    mask=[[True, True], [False, True], [True, True], [True, False]],
    rewards=[3.0, 0.0, 0.0, 1.0],
    groups=[5, 5, 5, 2],
    greedy_rewards=torch.tensor([1.0, 1.0, 1.0, 0.5], dtype=torch.float64),
)


@pytest.mark.parametrize(
    ("advantage", "settings", "expected"),
    [
        ("raw", {}, [[3, 3], [0, 0], [0, 0], [1, 0]]),
        ("group_center", {}, [[2, 2], [0, -1], [-1, -1], [0, 0]]),
        ("group_norm", {"eps": 0.0}, [[2**0.5] * 2, [0, -(0.5**0.5)], [-(0.5**0.5)] * 2, [0, 0]]),
        ("group_norm", {"eps": 0.0, "std": "sample"}, [[2 / 3**0.5] * 2, [0, -1 / 3**0.5], [-1 / 3**0.5] * 2, [0, 0]]),
        ("leave_one_out", {}, [[3, 3], [0, -1.5], [-1.5, -1.5], [0, 0]]),
        ("group_center_batch_norm", {"eps": 0.5}, [[2 / (RETURNS + 0.5)] * 2, [0, -1 / (RETURNS + 0.5)], None, [0, 0]]),
        ("batch_norm", {"eps": 0.0}, [[11 / 6 / TOKENS] * 2, [0, -7 / 6 / TOKENS], None, [-1 / 6 / TOKENS, 0]]),
        # own position 1: 3, 0, 0 of the group; own position 2: 3, 0
        ("position_center", {}, [[2, 1.5], [0, -1], [-1, -1.5], [0, 0]]),
        ("position_norm", {"eps": 0.0}, [[2**0.5, 1], [0, -(0.5**0.5)], [-(0.5**0.5), -1], [0, 0]]),
        ("positive", {}, [[1, 1], [0, 0], [0, 0], [1, 0]]),
        ("positive", {"rejected": -1.0}, [[1, 1], [0, -1], [-1, -1], [1, 0]]),
        ("greedy_baseline", {}, [[2, 2], [0, -1], [-1, -1], [0.5, 0]]),
        ("length_baseline", {}, [[1.8, 1.8], [0, -1.2], [-1.2, -1.2], [0, 0]]),
    ],
)  # fmt: skip
def test_by_hand(advantage: str, settings: dict[str, Any], expected: list[list[float] | None]) -> None:
    for got, wanted in zip(_advantages(RAGGED, advantage, **settings), expected, strict=True):
        if wanted is not None:
            assert got == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("advantage", CENTRED)
@pytest.mark.parametrize("size", [1, 3, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_no_advantage(advantage: str, size: int, dtype: torch.dtype) -> None:
    batch = tokens([[0.0] * 3] * size)
    batch = batch.replace(
        logp=batch.logp.to(dtype), rewards=torch.full((size,), 0.1, dtype=dtype), greedy_rewards=torch.zeros(size)
    )
    settings = {"eps": 0.0} if "eps" in AXES["advantage"].values[advantage].parameters else {}
    context = update_context(Objective(advantage=advantage, placement="none", **settings), batch)
    assert context.advantages.dtype == dtype
    assert not context.advantages.any()


def test_a_trajectory_without_own_tokens_enters_no_statistic() -> None:
    with_empty = tokens([[0.0]] * 3, mask=[[True], [True], [False]], rewards=[1.0, 0.0, 100.0], groups=[0, 0, 0])
    for advantage in CENTRED:
        assert _advantages(with_empty, advantage)[:2] == _advantages(with_empty.rows(slice(0, 2)), advantage)
        assert _advantages(with_empty, advantage)[2] == [0.0]


def test_kl_charges_the_returns_from_each_own_token_on() -> None:
    batch = tokens(
        [[-1.0] * 4],
        behaviour=[[-1.0] * 4],
        reference=[[-1.5, -9.0, -2.0, -3.0]],  # κ of the own tokens: 0.5, 1, 2
        mask=[[True, False, True, True]],
    )
    settings = {"estimator": "k1", "beta": 0.3, "kl_at": "rollout"}
    total = {"placement": "reward", "kl_scale": "sum"} | settings
    assert _advantages(batch, "raw", **total)[0] == pytest.approx([1 - 1.05, 0, 1 - 1.05, 1 - 1.05])
    to_go = {"placement": "reward_to_go", "kl_scale": "mean"} | settings
    assert _advantages(batch, "raw", **to_go)[0] == pytest.approx([1 - 0.35, 0, 1 - 0.3, 1 - 0.2])
    after = {"placement": "advantage"} | settings
    assert _advantages(batch, "group_norm", **after)[0] == pytest.approx([-0.15, 0, -0.3, -0.6])
    after_to_go = {"placement": "advantage_to_go"} | settings
    assert _advantages(batch, "group_norm", **after_to_go)[0] == pytest.approx([-1.05, 0, -0.9, -0.6])


def test_a_detached_kl_is_taken_where_it_is_asked_for() -> None:
    batch = tokens([[-1.0]], behaviour=[[-2.0]], reference=[[-4.0]])
    settings = {"estimator": "k1", "placement": "advantage", "beta": 1.0}
    assert _advantages(batch, "raw", kl_at="rollout", **settings) == [[-1.0]]
    assert _advantages(batch, "raw", kl_at="current", **settings) == [[-2.0]]


def test_positive_looks_at_the_task_reward_only() -> None:
    batch = tokens([[-1.0]] * 2, reference=[[-9.0]] * 2, rewards=[0.5, 0.0])
    assert _advantages(batch, "positive", placement="reward", estimator="k1", beta=5.0) == [[1.0], [0.0]]


def test_gae_skips_environment_tokens_and_bootstraps_from_the_next_own_one() -> None:
    batch = tokens(
        [[0.0] * 4],
        mask=[[True, False, True, True]],
        rewards=[2.0],
        values=torch.tensor([[0.5, 77.0, 1.0, -1.0]], dtype=torch.float64),
    )
    # δ = γ·V' − V, ..., R − V with γ = 0.5: 0.5·1 − 0.5, 0.5·(−1) − 1, 2 + 1; γλ = 0.25
    d = [0.0, -1.5, 3.0]
    expected = [d[0] + 0.25 * d[1] + 0.0625 * d[2], 0.0, d[1] + 0.25 * d[2], d[2]]
    assert _advantages(batch, "gae", gamma=0.5, lam=0.5)[0] == pytest.approx(expected)


def test_gae_gets_a_whole_reward_kl_on_the_last_own_token() -> None:
    batch = tokens([[-1.0] * 3], reference=[[-2.0, -5.0, -3.0]], mask=[[True, False, True]])
    settings = {"placement": "reward", "estimator": "k1", "beta": 0.1, "kl_scale": "sum"}
    assert _advantages(batch, "gae", gamma=0.5, lam=1.0, **settings)[0] == pytest.approx([0.35, 0.0, 0.7])
    settings["placement"] = "reward_to_go"
    assert _advantages(batch, "gae", gamma=0.5, lam=1.0, **settings)[0] == pytest.approx([0.3, 0.0, 0.8])


def test_greedy_baseline_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="needs greedy_rewards, which the batch does not have"):
        _advantages(tokens([[0.0]]), "greedy_baseline")


@pytest.mark.parametrize("advantage", sorted(AXES["advantage"].values))
def test_the_reward_of_a_group_of_one_cancels_where_the_catalogue_says_so(advantage: str) -> None:
    """Three groups of one with a KL in the reward; the first reward rises from 1 to 2."""
    drift = [[0.1, 0.3], [0.2, -0.4], [0.0, 0.1]]
    logits = torch.zeros(3, 2, 4, dtype=torch.float64)
    seen = {"greedy_rewards": torch.zeros(3), "logits": logits, "logits_reference": logits}
    batch = tokens(drift, rewards=[1.0, 4.0, 7.0], groups=[0, 1, 2], **seen)
    objective = Objective(advantage=advantage, estimator="k1", placement="reward_to_go", beta=0.1)
    better = batch.replace(rewards=torch.tensor([2.0, 4.0, 7.0], dtype=torch.float64))
    one, two = (update_context(objective, each).advantages for each in (batch, better))
    if AXES["advantage"].values[advantage].group_centred:
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    elif advantage != "positive":  # which reads the sign alone
        assert not torch.allclose(one, two, rtol=0, atol=1e-3)
