"""Importance ratios along a trajectory with gaps."""

from __future__ import annotations

import pytest
import torch

from klab.grid.catalogue import AXES
from klab.harness.objective.masking import last_token_mask, left_align, undo_left_align
from klab.harness.objective.ratio import RATIOS

MASK = torch.tensor([[False, True, True, False, True, False], [True, False, False, False, False, False]])
LOG_RATIO = torch.tensor([[0.0, 0.1, -0.4, 0.0, 0.9, 0.0], [0.3, 0, 0, 0, 0, 0]], dtype=torch.float64)
ADVANTAGE = torch.tensor([[0, 1.0, -2.0, 0, 1.0, 0], [-1.0, 0, 0, 0, 0, 0]], dtype=torch.float64)

GOLDEN = {
    "none": ([0.0, 0.0, 0.0], 0.0),
    "token": ([0.1, -0.4, 0.9], 0.3),
    "sequence_mean": ([0.2, 0.2, 0.2], 0.3),
    "future_mean": ([0.2, 0.25, 0.9], 0.3),
    "sequence_product": ([0.6, 0.6, 0.6], 0.3),
    "future_product": ([0.6, 0.5, 0.9], 0.3),
    "prefix_product": ([0.1, -0.3, 0.6], 0.3),
    "prefix_minimum": ([0.1, -0.3, 0.5], 0.3),
    "clipped_mean": ([0.1, 0.1, 0.1], 0.3),
}
"""By hand: log ρ at the three own tokens of the first trajectory, and at the one of the second."""


@pytest.mark.parametrize("name", list(AXES["ratio"].values))
def test_log_rho_by_hand(name: str) -> None:
    first, second = GOLDEN[name]
    clipping = {"advantage": ADVANTAGE, "clip_low": 0.2, "clip_high": 0.4} if name == "clipped_mean" else {}
    assert RATIOS[name](LOG_RATIO, MASK, **clipping)[MASK].tolist() == pytest.approx([*first, second], abs=1e-15)


def test_future_mean_ends_as_token_and_starts_as_sequence_mean() -> None:
    future = RATIOS["future_mean"](LOG_RATIO, MASK)
    last = last_token_mask(MASK)
    assert torch.equal(future[last], RATIOS["token"](LOG_RATIO, MASK)[last])
    first = last_token_mask(MASK.flip(1)).flip(1)
    torch.testing.assert_close(future[first], RATIOS["sequence_mean"](LOG_RATIO, MASK)[first], rtol=0, atol=1e-16)


def test_compact_moves_own_tokens_to_the_front_and_expand_moves_them_back() -> None:
    front = left_align(LOG_RATIO, MASK)
    assert front.tolist() == [[0.1, -0.4, 0.9, 0, 0, 0], [0.3, 0, 0, 0, 0, 0]]
    assert torch.equal(undo_left_align(front, MASK)[MASK], LOG_RATIO[MASK])
