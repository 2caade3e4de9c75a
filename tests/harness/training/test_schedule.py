"""Learning rates at given updates, and which rollout is drawn and used when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klab.grid.schema.sections import TrainingSection
from klab.harness.training.optim.schedule import RolloutSchedule, learning_rate


def rates(**settings: object) -> list[float]:
    training = TrainingSection(lr=1.0, **settings)
    return [learning_rate(training, update) for update in range(1, training.updates + 1)]


def test_constant_is_the_rate_at_every_update() -> None:
    assert rates(updates=3) == [1.0, 1.0, 1.0]


def test_warmup_rises_linearly_to_the_full_rate() -> None:
    assert rates(updates=6, warmup_updates=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_to_zero_one_update_after_the_last() -> None:
    assert rates(updates=4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]


def test_cosine_starts_full_and_is_half_in_the_middle() -> None:
    assert rates(updates=4, schedule="cosine") == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_decay_begins_after_warmup() -> None:
    assert rates(updates=4, warmup_updates=2, schedule="linear") == [0.5, 1.0, 1.0, 0.5]


def test_warmup_longer_than_the_cell_never_reaches_the_full_rate() -> None:
    assert rates(updates=2, warmup_updates=4, schedule="cosine") == [0.25, 0.5]


def test_an_update_knows_its_rollout_epoch_and_minibatch() -> None:
    table = RolloutSchedule(updates=9, epochs=2, minibatches=2, lag=0)
    assert [table.position(done) for done in range(9)] == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1),
        (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1),
        (2, 0, 0),
    ]  # fmt: skip
    assert table.rollouts == 3


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(0, 7))
def test_a_rollout_is_drawn_when_the_policy_is_exactly_lag_updates_older_than_its_first_use(
    updates: int, epochs: int, minibatches: int, lag: int
) -> None:
    table = RolloutSchedule(updates, epochs, minibatches, lag)
    drawn_at: dict[int, int] = {}
    for done in range(updates):
        for number in range(len(drawn_at), table.rollouts_needed(done)):
            drawn_at[number] = done
        assert table.position(done)[0] in drawn_at
    assert drawn_at == {number: max(0, number * table.updates_per_rollout - lag) for number in range(table.rollouts)}


def test_samples_of_the_reference_policy_never_lag() -> None:
    assert RolloutSchedule.of(TrainingSection(behaviour="reference", lag=3)).lag == 0
