"""Tabular policies: every trajectory exactly once, in the documented order, with the right probability."""

from __future__ import annotations

import itertools

import pytest
import torch

from klab.harness.exact import TabularPolicy
from klab.harness.exact.tabular import contexts_of
from tests.harness.exact.enumeration import policy_of, probability, sequences


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("vocabulary", "horizon"), [(2, 1), (5, 1), (2, 4), (3, 3), (4, 2)])
def test_fixed_length_trajectories_are_the_product_in_lexicographic_order(vocabulary: int, horizon: int) -> None:
    policy = TabularPolicy.random(vocabulary, horizon, generator=seeded(0))
    assert [tuple(row) for row in policy.trajectories.tokens.tolist()] == list(
        itertools.product(range(vocabulary), repeat=horizon)
    )
    assert policy.trajectories.mask.all()
    assert policy.horizon == horizon
    assert policy.logits.shape == (contexts_of(vocabulary, horizon), vocabulary)


@pytest.mark.parametrize(("vocabulary", "horizon", "end"), [(3, 3, None), (3, 4, 2), (2, 5, 0), (4, 2, -1), (3, 1, 1)])
def test_probabilities_agree_with_a_walk_down_the_tree(vocabulary: int, horizon: int, end: int | None) -> None:
    policy = TabularPolicy.random(vocabulary, horizon, scale=2.0, generator=seeded(1), end=end)
    tree = policy_of(policy.logits.tolist())
    walked = sequences(tree, policy.end)
    every = policy.trajectories
    written = [tuple(row[:length]) for row, length in zip(every.tokens.tolist(), every.lengths.tolist(), strict=True)]
    assert written == walked
    expected = [probability(tree, sequence) for sequence in walked]
    assert policy.probabilities().tolist() == pytest.approx(expected, rel=1e-13)
    assert sum(expected) == pytest.approx(1.0, abs=1e-13)


def test_an_end_symbol_stops_a_trajectory_and_is_its_last_own_token() -> None:
    policy = TabularPolicy(torch.zeros(contexts_of(3, 3), 3), end=-1)
    every = policy.trajectories
    assert policy.end == 2
    assert len(every) == 1 + 2 + 4 * 3  # ends at once, ends second, reaches the horizon
    for tokens, mask in zip(every.tokens.tolist(), every.mask.tolist(), strict=True):
        own = [token for token, is_own in zip(tokens, mask, strict=True) if is_own]
        assert 2 not in own[:-1]
        assert len(own) == 3 or own[-1] == 2
        assert all(token == 2 for token in tokens[len(own) :])


def test_sampling_follows_the_probabilities() -> None:
    policy = TabularPolicy.random(3, 3, generator=seeded(2), end=2)
    count = 200_000
    drawn = torch.bincount(policy.sample(count, seeded(3)), minlength=len(policy.trajectories)) / count
    expected = policy.probabilities()
    assert ((drawn - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_greedy_takes_the_most_probable_symbol_at_each_step() -> None:
    logits = torch.zeros(contexts_of(2, 2), 2)
    logits[0, 1], logits[2, 0] = 1.0, 3.0
    assert TabularPolicy(logits).trajectories.tokens[TabularPolicy(logits).greedy()].tolist() == [1, 0]


def test_token_scores_are_the_gradients_of_the_log_probabilities() -> None:
    logits = TabularPolicy.random(3, 2, generator=seeded(4), end=0).logits.requires_grad_()
    policy = TabularPolicy(logits, end=0)
    scores = policy.token_scores()
    for m, j in itertools.product(range(len(policy.trajectories)), range(2)):
        (expected,) = torch.autograd.grad(policy.token_logp()[m, j], logits, retain_graph=True)
        assert torch.allclose(scores[m, j], expected.flatten(), atol=1e-15)


def test_rewards_may_be_a_function_all_rows_or_the_distinct_trajectories() -> None:
    policy = TabularPolicy.random(2, 3, generator=seeded(5), end=1)
    tokens = policy.trajectories.tokens

    def count_zeros(rows: torch.Tensor) -> torch.Tensor:
        return (rows == 0).sum(-1)

    rows = torch.tensor(list(itertools.product(range(2), repeat=3)))
    expected = [3.0, 2.0, 1.0, 0.0]
    assert tokens.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]]
    for reward in (count_zeros, count_zeros(rows), torch.tensor(expected)):
        assert policy.reward_of(reward).tolist() == expected


@pytest.mark.parametrize(
    "broken",
    [
        lambda: TabularPolicy(torch.zeros(5, 3)),
        lambda: TabularPolicy(torch.zeros(3)),
        lambda: TabularPolicy(torch.zeros(1, 3), end=3),
        lambda: TabularPolicy(torch.zeros(1, 3)).reward_of(torch.zeros(4)),
        lambda: TabularPolicy(torch.zeros(1, 3)).reward_of(lambda tokens: tokens),
        lambda: TabularPolicy(torch.zeros(contexts_of(2, 19), 2)).trajectories,
    ],
)
def test_impossible_policies_and_rewards_are_refused(broken) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"logits|end symbol|reward|enumerate"):
        broken()
