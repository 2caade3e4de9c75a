"""Micro-batches by tokens: within the budget, without a trace in the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.harness.policy.footprint import SAMPLING_FACTOR
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.harness.store import Run
from klab.harness.training import microbatch, run_cells
from klab.harness.training.data.generate import generate
from klab.harness.training.data.rollouts import rollout_prompts
from klab.harness.training.microbatch import MemoryBudget, micro_batches
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, numbers


def pack(run: Run) -> Pack:
    return Pack([prepare_cell(run, run.cell(identity))[0] for identity in run.cells])


def laid_out(prompts: Sequence[int], group_size: int, lengths: Sequence[int]) -> Rollout:
    """Trajectory i has `lengths[i]` tokens i."""
    N, T = len(lengths), max(lengths)
    present = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    return Rollout(
        prompts=[[group] * length for group, length in enumerate(prompts)],
        group_size=group_size,
        tokens=torch.arange(N)[:, None] * present,
        mask=present,
        present=present,
        logp=torch.zeros(N, T),
        truncated=torch.zeros(N, dtype=torch.bool),
        texts=[str(i) for i in range(N)],
    )


def size(piece: Rollout) -> int:
    return sum(map(len, piece.prompts)) + int(piece.present.sum())


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    group = draw(st.integers(1, 4))
    completions = st.lists(st.integers(1, 9), min_size=group, max_size=group)
    rows = draw(st.lists(st.tuples(st.integers(1, 6), completions), min_size=1, max_size=5))
    return laid_out([prompt for prompt, _ in rows], group, [length for _, own in rows for length in own])


@settings(max_examples=300, deadline=None)
@given(rollouts(), st.integers(1, 60), st.one_of(st.none(), st.integers(1, 12)))
def test_pieces_keep_within_both_limits_and_waste_neither(whole: Rollout, tokens: int, rows: int | None) -> None:
    pieces = micro_batches(whole, MemoryBudget(rows, tokens))
    assert [row for _, part in pieces for row in range(part.start, part.stop)] == list(range(len(whole.tokens)))
    for piece, part in pieces:
        assert len(piece.tokens) == 1 or size(piece) <= tokens
        assert rows is None or len(piece.tokens) <= rows
        assert piece.texts == whole.texts[part]
        assert [piece.prompts[g][0] for g in piece.groups] == [whole.prompts[g][0] for g in whole.groups[part]]
    G = whole.group_size
    for (piece, part), (following, _) in pairwise(pieces):
        if part.stop % G:  # inside a group: its next row would have been too much
            rows_then, tokens_then = 1, int(whole.present[part.stop].sum())
        elif part.start % G:  # the rest of a group stays by itself
            continue
        else:  # between groups: the next whole one would have been too much
            rows_then = G
            tokens_then = len(following.prompts[0]) + int(whole.present[part.stop : part.stop + G].sum())
        more_rows, more_tokens = len(piece.tokens) + rows_then, size(piece) + tokens_then
        assert more_tokens > tokens or (rows is not None and more_rows > rows)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 30), st.integers(1, 99))
def test_draws_cover_the_prompts_and_fit(lengths: list[int], group_size: int, longest: int, tokens: int) -> None:
    parts = MemoryBudget(tokens=tokens).sampling_slices(lengths, group_size, longest)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(lengths)))
    for part in parts:
        held = (part.stop - part.start) * group_size * (max(lengths) + longest)
        assert held <= SAMPLING_FACTOR * tokens or part.stop - part.start == 1
    assert MemoryBudget(4).sampling_slices(lengths, group_size, longest) == [slice(0, len(lengths))]
    halves = MemoryBudget().halved(8).sampling_slices(lengths, group_size, longest)
    assert len(halves) == min(2, len(lengths))


EXACT: dict[str, Any] = {"dtype": "float64"}


@pytest.mark.parametrize("more", [{"token_budget": 23}, {"token_budget": 9, "micro_batch": 3}, {"token_budget": 1}])
@pytest.mark.parametrize(
    "objective",
    [
        {"placement": "loss", "weight": "ppo_clip"},
        {"estimator": "full", "placement": "loss"},
        {"weight": "kl_cov", "cov_share": 0.2, "entropy_bonus": 0.3, "entropy_share": 0.4},
        {"weight": "clip_cov", "cov_low": -1.0, "cov_share": 0.2, "entropy_share": 0.7},
    ],
)
def test_the_gradient_is_that_of_the_whole(make_run: MakeRun, more: dict[str, Any], objective: dict[str, Any]) -> None:
    # a large adam_eps makes a small step proportional to its gradient
    common = {"updates": 3, "lag": 1, "adam_eps": 1.0, "clip_norm": None, "lr": 0.3}
    found, rows = [], []
    for name, limits in (("whole", {}), ("pieces", more)):
        trained = pack(make_run(name, {**common, **limits}, [objective], policy=EXACT))
        rows.append([trained.advance()[0] for _ in range(3)])
        found.append(trained.policy.parameters)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-12)
    for whole, pieces in zip(*rows, strict=True):
        for key in ("loss", "k3", "entropy", "gradient_norm", "reward_mean", "tokens"):
            assert pieces[key] == pytest.approx(whole[key], rel=1e-9, abs=1e-12), key


def test_prompts_are_sampled_in_parts_with_the_numbers_of_the_whole(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microbatch, "SAMPLING_FACTOR", 1)
    trained = pack(make_run(policy=EXACT))
    examples = [rollout_prompts(trained.members[0], 0)]
    held: list[int] = []
    steps = StackedPolicy.decoder

    def counted(self: StackedPolicy, prompts: Any, group_size: int, *more: Any) -> Any:
        held.append(len(prompts[0]) * group_size)
        return steps(self, prompts, group_size, *more)

    monkeypatch.setattr(StackedPolicy, "decoder", counted)
    whole, parts = (
        generate(
            trained.policy, trained.members, examples, 4, ("test",), trained.settings.max_new_tokens, budget=limit
        )[0]
        for limit in (MemoryBudget(), MemoryBudget(tokens=2 * 4 * (3 + 4)))
    )
    assert held == [16, 8, 8]
    assert torch.equal(whole.tokens, parts.tokens)
    assert whole.prompts == parts.prompts
    assert whole.texts == parts.texts
    torch.testing.assert_close(whole.logp, parts.logp, rtol=0, atol=1e-12)


@pytest.mark.bits
def test_packed_is_alone_and_resumed_is_undisturbed(make_run: MakeRun) -> None:
    training = {"token_budget": 25, "updates_per_rollout": 2}
    packed = finished(make_run("packed", training, seeds=3))
    alone, broken = (make_run(name, training, seeds=3) for name in ("alone", "broken"))
    for identity in alone.cells:
        run_cells(alone.path, [identity])
        assert_same(packed, alone, identity)
    for _ in range(3):
        run_cells(broken.path, broken.cells, stop=StopAfter(1))
    finished(broken)
    for identity in broken.cells:
        assert_same(packed, broken, identity)


def test_out_of_memory_while_sampling_and_evaluating_is_tried_again_in_parts(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for the keys and values of 9 trajectories, where a rollout has 16 and an evaluation 18."""
    steps, refused = StackedPolicy.decoder, []

    def scarce(self: StackedPolicy, prompts: Any, group_size: int, *more: Any) -> Any:
        rows = len(prompts[0]) * group_size
        if rows > 9:
            refused.append(rows)
            raise MemoryError(f"{rows} trajectories are too many")
        return steps(self, prompts, group_size, *more)

    training = {"final_evaluation_samples": 3}
    whole = finished(make_run("whole", training, policy=EXACT))
    monkeypatch.setattr(StackedPolicy, "decoder", scarce)
    parts = finished(make_run("parts", training, policy=EXACT))
    assert refused == [18]
    mine, theirs = (numbers(run, run.cells[0])["metrics"] for run in (parts, whole))
    for one, other in zip(mine, theirs, strict=True):
        assert one["reward_mean"] == other["reward_mean"]
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-9)
