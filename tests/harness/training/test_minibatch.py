"""Minibatches cover an epoch, micro-batches cover a minibatch, and neither mixes up who belongs to which prompt."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.harness.policy.rollout import Rollout
from klab.harness.training.data.experience import Experience
from klab.harness.training.data.minibatch import minibatch_groups, select_groups
from klab.harness.training.microbatch import MemoryBudget, is_padding, micro_batches, pack_micro_batches


def experience(prompts: int, group_size: int) -> Experience:
    """Trajectory i has the single token i, reward i, and prompt [i // group_size]."""
    n = prompts * group_size
    rollout = Rollout(
        prompts=[[p] for p in range(prompts)],
        group_size=group_size,
        tokens=torch.arange(n)[:, None],
        mask=torch.ones(n, 1, dtype=torch.bool),
        present=torch.ones(n, 1, dtype=torch.bool),
        logp=-torch.arange(n, dtype=torch.float32)[:, None],
        truncated=torch.zeros(n, dtype=torch.bool),
        texts=[str(i) for i in range(n)],
    )
    column = torch.arange(n, dtype=torch.float32)
    wide = column[:, None]
    return Experience(0, rollout, column, column, wide, column, values=wide, old_logprobs=wide)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 9))
def test_an_epoch_visits_every_group_once(parts: int, size: int, epoch: int) -> None:
    count = parts * size
    seen = [group for part in range(parts) for group in minibatch_groups(count, parts, part, 7, 0, epoch)]
    assert sorted(seen) == list(range(count))


def test_epochs_are_cut_differently_and_always_alike() -> None:
    cuts = [minibatch_groups(16, 4, 0, 7, 0, epoch) for epoch in range(3)]
    assert cuts == [minibatch_groups(16, 4, 0, 7, 0, epoch) for epoch in range(3)]
    assert cuts[0] != cuts[1] != cuts[2]


@given(st.integers(1, 4), st.integers(1, 4))
def test_an_epoch_visits_every_trajectory_once(parts: int, group_size: int) -> None:
    whole = experience(parts * 2, group_size)
    seen = []
    for part in range(parts):
        chosen = select_groups(whole, minibatch_groups(parts * 2, parts, part, 1))
        tokens = chosen.rollout.tokens[:, 0].tolist()
        seen += tokens
        assert chosen.rewards.tolist() == chosen.correct.tolist() == chosen.reference_logprobs[:, 0].tolist() == tokens
        assert chosen.greedy_rewards is not None
        assert chosen.greedy_rewards.tolist() == tokens
        assert chosen.old_logprobs is not None
        assert chosen.old_logprobs[:, 0].tolist() == tokens
        assert chosen.values is not None
        assert chosen.values[:, 0].tolist() == tokens
        prompts = [chosen.rollout.prompts[g][0] for g in chosen.rollout.groups.tolist()]
        assert prompts == [token // group_size for token in tokens]
    assert sorted(seen) == list(range(len(whole.rewards)))


@settings(max_examples=200)
@given(st.integers(1, 5), st.integers(1, 7), st.one_of(st.none(), st.integers(1, 40)))
def test_micro_batches_cover_every_row_once_in_order(prompts: int, group_size: int, limit: int | None) -> None:
    whole = experience(prompts, group_size).rollout
    pieces = micro_batches(whole, MemoryBudget(limit))
    assert [row for _, rows in pieces for row in range(rows.start, rows.stop)] == list(range(prompts * group_size))
    for piece, rows in pieces:
        assert limit is None or len(piece.tokens) <= limit
        assert piece.tokens[:, 0].tolist() == list(range(rows.start, rows.stop))
        assert piece.texts == whole.texts[rows]
        answered = [piece.prompts[g][0] for g in piece.groups.tolist()]
        assert answered == [row // group_size for row in range(rows.start, rows.stop)]


def test_whole_groups_go_together_where_they_fit_and_others_are_cut() -> None:
    whole = experience(5, 4).rollout

    def bounds(limit: int) -> list[tuple[int, int]]:
        return [(rows.start, rows.stop) for _, rows in micro_batches(whole, MemoryBudget(limit))]

    assert bounds(9) == [(0, 8), (8, 16), (16, 20)]
    assert bounds(3) == [(0, 3), (3, 4), (4, 7), (7, 8), (8, 11), (11, 12), (12, 15), (15, 16), (16, 19), (19, 20)]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 7), st.one_of(st.none(), st.integers(1, 9)))
def test_packs_take_turns_even_where_cells_have_unequally_many_groups(
    groups: list[int], size: int, limit: int | None
) -> None:
    rollouts = [experience(count, size).rollout for count in groups]
    found = pack_micro_batches(rollouts, MemoryBudget(rows=limit))
    for cell, rollout in enumerate(rollouts):
        pieces = [turn[cell] for turn in found]
        own = [rows for piece, rows in pieces if not is_padding((piece, rows))]
        assert [row for rows in own for row in range(rows.start, rows.stop)] == list(range(len(rollout.tokens)))
        alone = [rows for ((_, rows),) in pack_micro_batches([rollout], MemoryBudget(rows=limit))]
        assert own == alone  # and then it waits for the others
        assert len(found) == max(len(pack_micro_batches([each], MemoryBudget(rows=limit))) for each in rollouts)
