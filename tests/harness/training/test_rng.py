"""Draws are pure functions of what they are for."""

from __future__ import annotations

import pytest
import torch

from klab.harness.training.runtime.rng import derived_seed, generator, permutation, sample_indices


def test_a_derived_seed_is_the_same_on_every_machine() -> None:
    # first 8 bytes of sha256(b"rollout/3/7"), halved; computed with sha256sum
    assert derived_seed("rollout", 3, 7) == 0x7ADEA5891C32AA97


def test_every_part_and_their_order_matter() -> None:
    seeds = {derived_seed(*parts) for parts in [("a", 1, 2), ("a", 2, 1), ("b", 1, 2), ("a", 12), ("a", 1)]}
    assert len(seeds) == 5


def test_a_generator_starts_afresh_each_time() -> None:
    first = torch.rand(4, generator=generator("x", 1))
    assert torch.equal(first, torch.rand(4, generator=generator("x", 1)))
    assert not torch.equal(first, torch.rand(4, generator=generator("x", 2)))


def test_choosing_is_without_replacement() -> None:
    assert sorted(sample_indices(10, 10, "p", 0)) == list(range(10))
    assert len(set(sample_indices(10**12, 50, "p", 0))) == 50


def test_more_than_there_are_takes_whole_passes_first() -> None:
    chosen = sample_indices(3, 8, "p", 0)
    assert [chosen.count(index) for index in range(3)].count(3) == 2
    assert len(chosen) == 8


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ValueError, match="empty split"):
        sample_indices(0, 1, "p")


def test_a_permutation_holds_everything_once() -> None:
    assert sorted(permutation(7, "m", 1)) == list(range(7))
    assert permutation(7, "m", 1) != permutation(7, "m", 2)
