"""A batch whose tensors do not fit together is refused with the field's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from klab.harness.objective import TokenBatch
from klab.harness.objective.groups import Groups, mean_and_std
from tests.support.random_batches import tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logp": torch.zeros(2)}, r"logp must be floating point \[N, T\], not torch.float32 \[2\]"),
        ({"logp": torch.zeros(2, 3, dtype=torch.long)}, "logp must be floating point"),
        ({"logp": torch.zeros(2, 0)}, r"a batch needs a trajectory and a position, not \[2, 0\]"),
        ({"logp_behaviour": torch.zeros(2, 4)}, r"logp_behaviour must have the shape \[2, 3\], not \[2, 4\]"),
        ({"logp_reference": torch.zeros(3, 3)}, "logp_reference must have"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool, not torch.float32"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask must have the shape \[2, 3\]"),
        ({"rewards": torch.zeros(2, 1)}, r"rewards must have the shape \[2\], not \[2, 1\]"),
        ({"groups": torch.zeros(2)}, "groups must be integers, not torch.float32"),
        ({"groups": torch.zeros(3, dtype=torch.long)}, "groups must have"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"logits": torch.zeros(2, 4, 5)}, r"logits must have the shape \[2, 3, 5\]"),
        ({"logits": torch.zeros(2, 3)}, "logits must have the shape"),
        ({"logits": torch.zeros(2, 3, 5), "logits_reference": torch.zeros(2, 3, 6)}, "logits_reference must have"),
        ({"greedy_rewards": torch.zeros(1)}, "greedy_rewards must have"),
        ({"values": torch.zeros(2, 2)}, "values must have"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens([[0.0] * 3] * 2).replace(**change)


def test_rows_takes_the_same_rows_of_every_tensor() -> None:
    batch = TokenBatch(
        *(torch.arange(6.0).view(3, 2) + k for k in range(3)),
        mask=torch.tensor([[True, False], [True, True], [False, True]]),
        rewards=torch.tensor([1.0, 2.0, 3.0]),
        groups=torch.tensor([4, 4, 9]),
        max_new_tokens=7,
        logits=torch.arange(12.0).view(3, 2, 2),
        logits_reference=torch.zeros(3, 2, 2),
    )
    part = batch.rows(torch.tensor([2, 0]))
    assert part.logp_behaviour.tolist() == [[5.0, 6.0], [1.0, 2.0]]
    assert part.mask.tolist() == [[False, True], [True, False]]
    assert part.rewards.tolist() == [3.0, 1.0]
    assert part.groups.tolist() == [9, 4]
    assert part.max_new_tokens == 7
    assert part.logits is not None
    assert part.logits[0].tolist() == [[8.0, 9.0], [10.0, 11.0]]
    assert part.values is None


@pytest.mark.parametrize("labels", [[7, 3, 7, 7, -2, 3], [0, 0, 0], [5]])
def test_groups_lay_trajectories_side_by_side(labels: list[int]) -> None:
    values = torch.arange(1.0, 1.0 + 2 * len(labels)).view(-1, 2)
    found = Groups.from_labels(torch.tensor(labels))
    dense = torch.tensor([sorted(set(labels)).index(label) for label in labels])
    for groups in (found, Groups.from_labels(dense, found.count)):
        sums = groups.to_rows(groups.to_groups(values).sum(1))
        for row, label in enumerate(labels):
            members = [i for i, other in enumerate(labels) if other == label]
            assert torch.equal(sums[row], values[members].sum(0))


def test_even_groups_are_those_of_their_labels() -> None:
    even = Groups.equal_sized(3, 2, torch.device("cpu"))
    found = Groups.from_labels(torch.tensor([0, 0, 1, 1, 2, 2]))
    assert (even.count, even.size) == (found.count, found.size) == (3, 2)
    assert torch.equal(even.index, found.index)
    assert torch.equal(even.slot, found.slot)


def test_moments_of_equal_values_are_exact() -> None:
    values = torch.full((1, 3, 1), 0.1, dtype=torch.float64)
    mean, spread = mean_and_std(values, torch.ones_like(values, dtype=torch.bool), "sample")
    assert mean.tolist() == [[0.1]]
    assert spread.tolist() == [[0.0]]
