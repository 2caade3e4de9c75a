"""Groups that leave the update, trajectories that the loss leaves out, and what overlong ones cost."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from klab.grid import UserError
from klab.grid.schema.sections import load_section
from klab.harness.objective import TokenBatch, objective_loss
from klab.harness.policy.scores import token_scores
from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.harness.training.data.dynamic_sampling import nonzero_variance_groups
from klab.harness.training.data.minibatch import select_groups
from klab.harness.training.data.overlong import length_penalties
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, numbers

DROP: dict[str, Any] = {"equal_groups": "drop", "group_size": 2, "prompts": 6, "weight_decay": 0.1}
STEP = {"adam_eps": 1.0, "clip_norm": None, "lr": 0.3}
"""A large adam_eps makes a small step proportional to its gradient."""


def pack(run: Run) -> Pack:
    return Pack([prepare_cell(run, run.cell(identity))[0] for identity in run.cells])


def copy_of(trained: Pack) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trained.policy.parameters.items()}


def gradient_of_loss(trained: Pack, groups: list[int] | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    """The gradient of the pending rollout's loss, computed here from its parts; of some groups only where given."""
    member, experience = trained.members[0], trained.pending[0][0]
    if groups is not None:
        experience = select_groups(experience, groups)
    rollout = experience.rollout
    logp = token_scores(trained.policy, [rollout])[0].logp
    batch = TokenBatch(
        logp, logp.detach(), experience.reference_logprobs, rollout.mask, experience.rewards, rollout.groups,
        member.max_new_tokens,
    )  # fmt: skip
    loss = objective_loss(member.cell.objective, replace(batch, **changes)).loss
    names = list(trained.policy.parameters)
    return dict(zip(names, torch.autograd.grad(loss, [trained.policy.parameters[n] for n in names]), strict=True))


def assert_step(trained: Pack, expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The next update moves the weights by Adam's first step on this gradient; its row."""
    before = copy_of(trained)
    (row,) = trained.advance()
    for name, gradient in expected.items():
        step = -STEP["lr"] * gradient / (gradient.abs() + STEP["adam_eps"])
        torch.testing.assert_close(trained.policy.parameters[name].detach() - before[name], step, rtol=0, atol=2e-6)
    norm = sum(float(gradient.double().square().sum()) for gradient in expected.values()) ** 0.5
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    return row


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_denominators_count_the_groups_that_are_left(make_run: MakeRun, aggregation: str) -> None:
    objective = {"placement": "loss", "beta": 0.1, "aggregation": aggregation, "advantage": "group_center"}
    trained = pack(make_run(training={**DROP, **STEP, "weight_decay": 0.0}, objectives=[objective]))
    trained.collect_due_rollouts()
    experience = trained.pending[0][0]
    left = nonzero_variance_groups(experience.rewards, 2)
    assert 0 < len(left) < 6
    row = assert_step(trained, gradient_of_loss(trained, left))
    assert row["kept_groups"] == len(left)
    assert row["reward_mean"] == pytest.approx(float(experience.rewards.mean()))
    assert row["tokens"] == int(experience.rollout.mask.sum())
    assert row["loss_tokens"] == int(select_groups(experience, left).rollout.mask.sum()) < row["tokens"]


@pytest.mark.parametrize("critic", [None, {"kind": "head"}], ids=["alone", "with a critic"])
def test_an_update_without_groups_changes_nothing(make_run: MakeRun, critic: dict[str, Any] | None) -> None:
    training = {**DROP, "updates_per_rollout": 2, "beta_control": {"target": 0.1}, "critic": critic}
    objective = {"placement": "loss", **({"advantage": "gae"} if critic else {})}
    trained = pack(make_run(training=training, task={"reward": "0.25"}, objectives=[objective]))
    before, state = copy_of(trained), copy.deepcopy(trained.state(0))
    for _ in range(2):
        (row,) = trained.advance()
        assert (row["kept_groups"], row["loss_tokens"], row["gradient_norm"], row["loss"]) == (0, 0, 0.0, 0.0)
        assert not row["nonfinite"]
        assert (row["reward_mean"], row["reward_std"]) == (0.25, 0.0)
        assert row["tokens"] > 0
    assert all(torch.equal(value, before[name]) for name, value in trained.policy.parameters.items())
    after = trained.state(0)
    for name, value in [*state.optimizer.items(), *((f"critic {n}", v) for n, v in state.critic.items())]:
        found = after.critic[name[7:]] if name.startswith("critic ") else after.optimizer[name]
        assert torch.equal(value, found), name
    assert after.coefficients == state.coefficients


@pytest.mark.parametrize("more", [{"micro_batch": 3, "lag": 1}, {"updates_per_rollout": 2, "minibatches": 2}])
def test_cells_that_drop_are_the_same_alone_packed_and_resumed(make_run: MakeRun, more: dict[str, Any]) -> None:
    training = {**DROP, **more, "updates": 4}
    objectives = [{"advantage": "batch_norm"}, {"weight": "adaptive"}]
    packed = finished(make_run("packed", training, objectives, seeds=2))
    broken = make_run("broken", training, objectives, seeds=2)
    for identity in broken.cells:
        run_cells(broken.path, [identity], stop=StopAfter(1))
        run_cells(broken.path, [identity])
        assert_same(packed, broken, identity)
    assert len({row["kept_groups"] for each in packed.cells for row in numbers(packed, each)["metrics"]}) > 1


def test_micro_batches_have_the_gradient_of_what_is_left(make_run: MakeRun) -> None:
    params = []
    for name, more in (("whole", {}), ("pieces", {"micro_batch": 3})):
        trained = pack(make_run(name, {**DROP, **STEP, **more, "truncated": "mask"}, seeds=3))
        trained.advance()
        params.append(copy_of(trained))
    for name, value in params[0].items():
        torch.testing.assert_close(params[1][name], value, rtol=0, atol=1e-6)


def test_truncated_trajectories_count_in_the_advantage_and_not_in_the_loss(make_run: MakeRun) -> None:
    objective = {"placement": "loss", "beta": 0.1, "aggregation": "token_mean"}
    trained = pack(make_run(training={**STEP, "truncated": "mask"}, objectives=[objective]))
    trained.collect_due_rollouts()
    rollout = trained.pending[0][0].rollout
    assert 0 < int(rollout.truncated.sum()) < len(rollout.truncated)
    row = assert_step(trained, gradient_of_loss(trained, excluded_from_loss=rollout.truncated))
    assert row["loss_tokens"] == int(rollout.mask[~rollout.truncated].sum())
    assert row["tokens"] == int(rollout.mask.sum())


def test_nothing_is_learnt_where_every_trajectory_is_truncated(make_run: MakeRun) -> None:
    trained = pack(make_run(training={"truncated": "mask", "max_new_tokens": 1, "prompts": 1, "weight_decay": 0.1}))
    before = copy_of(trained)
    for _ in range(20):
        trained.collect_due_rollouts()
        all_of_it = bool(trained.pending[0][0].rollout.truncated.all())
        trained.advance()
        same = all(torch.equal(value, before[name]) for name, value in trained.policy.parameters.items())
        assert same == all_of_it
        if not all_of_it:
            return
        before = copy_of(trained)
    pytest.fail("no trajectory ended by itself")


def test_the_soft_overlong_punishment_of_dapo(make_run: MakeRun) -> None:
    training = {"max_new_tokens": 20, "overlong_buffer": 5, "overlong_penalty": 2.0}
    trained = pack(make_run(training=training))
    trained.collect_due_rollouts()
    rollout = trained.pending[0][0].rollout
    lengths = torch.tensor([0, 1, 14, 15, 16, 17, 18, 19, 20])
    written = replace(rollout, mask=torch.arange(20) < lengths[:, None])
    # equation 13: 0 up to 15, then (15 − |y|)/5, then −1; times 2
    expected = torch.tensor([0, 0, 0, 0, 0.4, 0.8, 1.2, 1.6, 2.0], dtype=torch.float64)
    torch.testing.assert_close(length_penalties(written, trained.members[0]), expected, rtol=0, atol=1e-15)


def test_the_punishment_is_learnt_from_and_the_tasks_reward_is_recorded(make_run: MakeRun) -> None:
    training = {**STEP, "overlong_buffer": 3}
    objective = {"placement": "none", "advantage": "group_center"}
    trained = pack(make_run(training=training, objectives=[objective]))
    trained.collect_due_rollouts()
    experience = trained.pending[0][0]
    lengths = experience.rollout.mask.sum(1)
    assert len(set(lengths.tolist())) == 4
    expected = experience.rewards - (lengths - 1) / 3  # a budget of 4
    row = assert_step(trained, gradient_of_loss(trained, rewards=expected))
    assert row["reward_mean"] == pytest.approx(float(experience.rewards.mean()))
    assert row["overlong"] == pytest.approx(float(((lengths - 1) / 3).mean()))


def test_a_buffer_longer_than_the_tasks_budget_is_a_mistake(make_run: MakeRun) -> None:
    run = make_run(training={"overlong_buffer": 5})
    assert run_cells(run.path, run.cells) == {run.cells[0]: "failed"}
    message = run.cell(run.cells[0]).error() or ""
    assert "training.overlong_buffer: exceeds the 4 tokens that task 'letters' allows (got 5)" in message


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"training\.group_size: the rewards of a group of one are always equal"):
        load_section("training", {"equal_groups": "drop", "group_size": 1})
    with pytest.raises(UserError, match=r"training\.overlong_buffer: exceeds the 4 tokens"):
        load_section("training", {"overlong_buffer": 5, "max_new_tokens": 4})
