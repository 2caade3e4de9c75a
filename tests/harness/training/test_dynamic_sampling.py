"""Dynamic sampling: which groups an update gets, what they cost, and that nobody's mates matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klab.harness.policy.rollout import Rollout
from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.harness.training.data.dynamic_sampling import (
    SampledGroups,
    SamplingStats,
    fill,
    nonzero_variance_groups,
    shortfall,
)
from klab.harness.training.data.generate import generate
from klab.harness.training.data.rollouts import rollout_prompts
from klab.harness.training.data.scoring import score_completions
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from klab.tasks import Example
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, numbers

SIZE = 2
GREEDY = {"advantage": "greedy_baseline"}
REFILL: dict[str, Any] = {"equal_groups": "refill", "group_size": SIZE, "prompts": 6}


def drawn(rewards: list[list[float]], first: int = 0, length: int = 1) -> SampledGroups:
    """A draw of one group per list of rewards; group g has the prompt [first + g] and `length` tokens of that id."""
    flat = torch.tensor(rewards, dtype=torch.float32).flatten()
    N, groups = len(flat), range(first, first + len(rewards))
    tokens = torch.tensor([g for g in groups for _ in rewards[0]])[:, None].expand(N, length)
    own = torch.ones(N, length, dtype=torch.bool)
    rollout = Rollout(
        prompts=[[g] for g in groups],
        group_size=len(rewards[0]),
        tokens=tokens,
        mask=own,
        present=own,
        logp=-tokens.float(),
        truncated=torch.zeros(N, dtype=torch.bool),
        texts=[str(g) for g in tokens[:, 0].tolist()],
    )
    return SampledGroups([Example(str(g), "") for g in groups], rollout, flat, (flat > 0).float())


def test_a_group_is_uneven_unless_all_of_its_rewards_are_equal() -> None:
    nan, inf = float("nan"), float("inf")
    rewards = torch.tensor([0.5, 0.5, 0.5, 0.4, nan, nan, inf, inf, -inf, inf, 0.0, -0.0])
    assert nonzero_variance_groups(rewards, 2) == [1, 2, 4]
    assert nonzero_variance_groups(rewards, 3) == [1, 2, 3]
    assert nonzero_variance_groups(rewards, 1) == [4, 5]  # NaN differs even from itself


def test_what_is_found_comes_first_and_equal_groups_of_the_first_draw_fill_the_rest() -> None:
    even, odd = [0.0, 0.0], [0.0, 1.0]
    draws = [drawn([even, odd, even, even]), drawn([even, even, odd, even], 10, length=3)]
    assert shortfall(draws, 4) == 2
    found = fill(draws, 4)
    assert [prompt for (prompt,) in found.rollout.prompts] == [1, 12, 0, 2]
    assert [example.prompt for example in found.examples] == ["1", "12", "0", "2"]
    assert found.rewards.tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert found.correct.tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert found.rollout.tokens[:, 0].tolist() == [1, 1, 12, 12, 0, 0, 2, 2]
    assert found.rollout.mask.sum(1).tolist() == [1, 1, 3, 3, 1, 1, 1, 1]
    assert found.rollout.texts == ["1", "1", "12", "12", "0", "0", "2", "2"]
    more = fill([*draws, drawn([odd, odd, odd, odd], 20)], 4)
    assert [prompt for (prompt,) in more.rollout.prompts] == [1, 12, 20, 21]
    assert shortfall([*draws, drawn([odd, odd, odd, odd], 20)], 4) == 0


def test_the_account_has_all_draws_but_the_rewards_of_the_first() -> None:
    draws = [drawn([[0.0, 0.0], [0.0, 1.0]]), drawn([[1.0, 1.0]], 10, length=3)]
    account = SamplingStats.of(draws, fill(draws, 2))
    assert (account.groups, account.tokens, account.unused) == (3, 10, 6)
    assert (account.reward_mean, account.correct) == (0.25, 0.25)
    assert account.reward_std == pytest.approx(0.1875**0.5)


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5))
def test_there_are_always_as_many_groups_as_prompts(rounds: list[list[bool]]) -> None:
    draws = [drawn([[0.0, float(odd)] for odd in each], 10 * i) for i, each in enumerate(rounds)]
    found = fill(draws, 3)
    informative = min(3, sum(map(sum, rounds)))
    assert len({prompt for (prompt,) in found.rollout.prompts}) == len(found.examples) == 3
    assert nonzero_variance_groups(found.rewards, 2) == list(range(informative))
    assert shortfall(draws, 3) == 3 - informative


def pack(run: Run) -> Pack:
    return Pack([prepare_cell(run, run.cell(identity))[0] for identity in run.cells])


def test_further_draws_have_new_prompts_while_there_are_others(make_run: MakeRun) -> None:
    member = pack(make_run(training={**REFILL, "prompts": 20})).members[0]
    assert len(member.task.split("train")) == 48
    rounds = [[e.prompt for e in rollout_prompts(member, 3, again)] for again in range(4)]
    assert rounds == [[e.prompt for e in rollout_prompts(member, 3, again)] for again in range(4)]
    assert [len(set(each)) for each in rounds] == [20, 20, 20, 20]
    assert not set(rounds[0]) & set(rounds[1])
    assert len(set(rounds[2]) - set(rounds[0]) - set(rounds[1])) == 8  # all that were left
    assert set().union(*rounds[:3]) == {e.prompt for e in member.task.split("train")}


@pytest.mark.parametrize(("rounds", "enough"), [(1, False), (6, True)])
def test_a_rollout_is_its_uneven_groups_in_the_order_in_which_they_were_drawn(
    make_run: MakeRun, rounds: int, enough: bool
) -> None:
    run = make_run(training={**REFILL, "refill_rounds": rounds, "temperature": 0.5}, objectives=[GREEDY])
    trained = pack(run)
    member, policy = trained.members[0], trained.policy
    trained.collect_due_rollouts()
    got = trained.pending[0][0]
    uneven_groups, equal_groups, groups, tokens = [], [], 0, 0
    for again in range(rounds + 1):
        examples = rollout_prompts(member, 0, again)
        purpose = ("rollout", 0, "again", again) if again else ("rollout", 0)
        rollout = generate(policy, [member], [examples], SIZE, purpose, member.max_new_tokens, 0.5)[0]
        rewards = [s.reward for s in score_completions([member], 0, examples, rollout)]
        groups, tokens = groups + 6, tokens + int(rollout.mask.sum())
        for g, example in enumerate(examples):
            one, two = rewards[SIZE * g : SIZE * g + SIZE]
            found = (example, rollout.texts[SIZE * g : SIZE * g + SIZE])
            (uneven_groups if one != two else equal_groups).append(found)
        if len(uneven_groups) >= 6:
            break
    assert (len(uneven_groups) >= 6) == enough
    assert len(uneven_groups) > 1
    kept = (uneven_groups + equal_groups)[:6]
    assert got.rollout.texts == [text for _, texts in kept for text in texts]
    assert got.sampling_stats is not None
    assert (got.sampling_stats.groups, got.sampling_stats.tokens) == (groups, tokens)
    greedy = generate(policy, [member], [[example for example, _ in kept]], 1, None, member.max_new_tokens)[0]
    expected = [member.task.score(e, text).reward for (e, _), text in zip(kept, greedy.texts, strict=True)]
    assert got.greedy_rewards is not None
    assert got.greedy_rewards.tolist() == [reward for reward in expected for _ in range(SIZE)]


def test_the_record_tells_the_cost_and_the_reward_before_groups_were_chosen(make_run: MakeRun) -> None:
    rows = [
        numbers(run, run.cells[0])["metrics"][0]
        for run in (
            finished(make_run("keep", {**REFILL, "equal_groups": "keep", "updates": 1})),
            finished(make_run("refill", {**REFILL, "updates": 1})),
        )
    ]
    for name in ("reward_mean", "reward_std", "correct"):
        assert rows[0][name] == rows[1][name]
    assert set(rows[1]) - set(rows[0]) == {"sampled_groups", "sampled_tokens", "unused_tokens"}
    assert rows[1]["sampled_groups"] in (12, 18, 24)
    assert rows[1]["sampled_tokens"] == rows[1]["tokens"] + rows[1]["unused_tokens"] > rows[1]["tokens"]
    assert rows[1]["informative_groups"] > rows[0]["informative_groups"]


@pytest.mark.parametrize("more", [{"lag": 1}, {"updates_per_rollout": 2, "minibatches": 2}], ids=["lag", "minibatches"])
def test_interrupted_and_packed_cells_end_with_the_same_bits(make_run: MakeRun, more: dict[str, Any]) -> None:
    training = {**REFILL, **more, "updates": 4}
    objectives = [GREEDY, {"weight": "ppo_clip"}]
    packed = finished(make_run("packed", training, objectives, seeds=2))
    broken = make_run("broken", training, objectives, seeds=2)
    for identity in broken.cells:
        for _ in range(3):
            assert run_cells(broken.path, [identity], stop=StopAfter(1)) == {identity: "interrupted"}
        run_cells(broken.path, [identity])
        assert_same(packed, broken, identity)
    for identity in packed.cells:
        found = numbers(packed, identity)
        drawn_in_vain = {row["rollout"]: row["unused_tokens"] for row in found["metrics"]}
        trained_on = sum(row["tokens"] for row in found["metrics"])
        assert found["result"]["tokens"] == trained_on + sum(drawn_in_vain.values())
    counts = {row["sampled_groups"] for each in packed.cells for row in numbers(packed, each)["metrics"]}
    assert len(counts) > 1  # cells of the pack needed different numbers of draws
