"""Critics learn the values of the policy, help it, and are part of a cell's state to the last bit."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from klab.harness.training import checkpoint, run_cells
from klab.harness.training.metrics import same_numbers
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, numbers

GAE: dict[str, Any] = {"advantage": "gae", "placement": "none"}
KINDS = ("model", "head")
COLUMNS = {"value_loss", "explained_variance", "value_clip_fraction", "critic_gradient_norm"}


def pack(run: Any) -> Pack:
    return Pack([prepare_cell(run, run.cell(identity))[0] for identity in run.cells])


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_after_every_update_with_lagged_values_in_the_queue(make_run: MakeRun, kind: str) -> None:
    training = {"critic": {"kind": kind, "lr": 0.02}, "lag": 2, "minibatches": 2}
    through, broken = (make_run(name, training, [GAE]) for name in ("through", "broken"))
    finished(through)
    identity = broken.cells[0]
    for _ in range(5):
        assert run_cells(broken.path, [identity], stop=StopAfter(1)) == {identity: "interrupted"}
    assert run_cells(broken.path, [identity]) == {identity: "finished"}
    assert_same(through, broken, identity)
    assert set(through.cell(identity).metrics()[0]) >= COLUMNS


@pytest.mark.bits
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_alone(make_run: MakeRun, kind: str) -> None:
    objectives = [{**GAE, "lam": 0.5, "whiten": "batch"}, {"advantage": "gae", "placement": "reward_to_go"}]
    training = {"critic": {"kind": kind}, "updates_per_rollout": 2, "micro_batch": 8}
    packed, alone = (make_run(name, training, objectives) for name in ("packed", "alone"))
    finished(packed)
    for identity in alone.cells:
        run_cells(alone.path, [identity])
        assert_same(packed, alone, identity)


POLICIES: dict[str, dict[str, Any]] = {
    "16-bit adapters": {"lora": {"rank": 2, "alpha": 8.0}, "dtype": "bfloat16"},
    "16-bit": {"dtype": "bfloat16"},
    "transformers": {"engine": "transformers"},
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("model", "16-bit adapters"), ("head", "16-bit adapters"), ("model", "16-bit"), ("head", "transformers")],
)
def test_critics_of_other_policies(make_run: MakeRun, kind: str, name: str) -> None:
    """Packed through and resumed alone, to the bit; what a critic of adapters keeps is adapters too."""
    policy = POLICIES[name]
    training = {"critic": {"kind": kind}, "updates": 3, "updates_per_rollout": 2, "evaluate_every": 3}
    objectives = [GAE, {**GAE, "lam": 0.5}]
    through, broken = (make_run(each, training, objectives, policy=policy) for each in ("through", "broken"))
    finished(through)
    identity = broken.cells[0]
    assert run_cells(broken.path, [identity], stop=StopAfter(2)) == {identity: "interrupted"}
    names = load_file(broken.cell(identity).checkpoint / checkpoint.FILE)
    own = {name.removeprefix("critic/weight/") for name in names if name.startswith("critic/weight/")}
    assert {"value.weight", "value.bias"} <= own
    assert (len(own) == 2) == (kind == "head")
    if "lora" in policy:
        assert {name.rsplit(".", 1)[1] for name in own} <= {"A", "B", "weight", "bias"}
    assert run_cells(broken.path, [identity]) == {identity: "finished"}
    assert_same(through, broken, identity)
    rows = numbers(through, identity)["metrics"]
    assert rows[1]["value_loss"] < rows[0]["value_loss"], "the second pass over the same rollout"


def test_a_pack_that_loses_a_member_keeps_the_others_critics_and_coefficients(make_run: MakeRun) -> None:
    training = {"critic": {}, "beta_control": {"target": 0.01}, "lag": 1}
    trained = pack(make_run(training=training, objectives=[{"advantage": "gae"}, {"advantage": "gae", "lam": 0.5}]))
    for _ in range(2):
        trained.advance()
    rest = trained.select([1])
    left, right = rest.advance()[0], trained.advance()[1]
    assert same_numbers(left) == same_numbers(right)
    assert left["beta"] != 0.04
    assert left["explained_variance"] is not None


def weights_of(optimizer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in optimizer.parameters.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_before_its_first_update_a_critic_changes_no_bit_of_the_policys(make_run: MakeRun, kind: str) -> None:
    with_critic, without = (
        pack(make_run(name, training, [GAE]))
        for name, training in (("with", {"critic": {"kind": kind}}), ("without", {}))
    )
    rows = [each.advance()[0] for each in (with_critic, without)]
    assert rows[0]["loss"] == rows[1]["loss"]
    assert rows[0]["value_loss"] > 0
    for name, value in without.policy.parameters.items():
        assert torch.equal(with_critic.policy.parameters[name], value), name
    rows = [each.advance()[0] for each in (with_critic, without)]
    assert rows[0]["loss"] != rows[1]["loss"], "values that were learned must move the advantages"


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_critic_when_the_rollout_was_drawn(make_run: MakeRun, kind: str) -> None:
    trained = pack(make_run(training={"critic": {"kind": kind}, "lag": 2}, objectives=[GAE]))
    trained.advance()
    trained.advance()
    trained.collect_due_rollouts()
    drawn = [experience for (experience,) in trained.pending]
    assert trained.critics is not None
    assert [each.number for each in drawn] == [2, 3, 4]
    before = [each.values.clone() for each in drawn]  # type: ignore[union-attr]
    assert all(bool(each.any()) for each in before[1:])
    trained.critics.compute_values([drawn[-1]], trained.policy)
    assert torch.equal(drawn[-1].values, before[-1])  # type: ignore[arg-type]
    trained.critics.compute_values([drawn[0]], trained.policy)
    assert not torch.equal(drawn[0].values, before[0]), "an older rollout has older values"  # type: ignore[arg-type]
    assert not bool(before[-1][~drawn[-1].rollout.mask].any())


@pytest.mark.bits
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_have_the_gradient_of_the_whole(make_run: MakeRun, kind: str) -> None:
    # a large adam_eps makes a small step proportional to its gradient
    training = {"critic": {"kind": kind, "lr": 3.0}, "lag": 1, "adam_eps": 1.0, "clip_norm": None, "lr": 0.3}
    objective = {**GAE, "lam": 0.9, "whiten": "batch", "policy.dtype": "float64"}
    found, rows = [], []
    for name, more in (("whole", {}), ("pieces", {"micro_batch": 6})):
        trained = pack(make_run(name, {**training, **more}, [objective]))
        rows.append([trained.advance()[0] for _ in range(3)])
        assert trained.critics is not None
        found.append(
            {
                **weights_of(trained.optimizer),
                **{f"critic {n}": v for n, v in weights_of(trained.critics.optimizer).items()},
            }
        )
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-12)
    for whole, pieces in zip(*rows, strict=True):
        for column in COLUMNS:
            assert pieces[column] == pytest.approx(whole[column], rel=1e-11), column


@pytest.mark.parametrize("kind", KINDS)
def test_during_the_warm_up_only_the_critic_learns(make_run: MakeRun, kind: str) -> None:
    critic = {"kind": kind, "warmup_updates": 2}
    trained = pack(make_run(training={"critic": critic, "weight_decay": 0.1}, objectives=[GAE]))
    assert trained.critics is not None
    start, blank = weights_of(trained.optimizer), weights_of(trained.critics.optimizer)
    assert [trained.advance()[0]["lr"] for _ in range(2)] == [0.0, 0.0]
    for name, value in start.items():
        assert torch.equal(trained.policy.parameters[name], value), name
    assert not torch.equal(trained.critics.head.parameters["value.weight"], blank["value.weight"])
    assert float(trained.optimizer.state(0)["steps"]) == 0.0
    assert trained.advance()[0]["lr"] == 0.01
    assert any(not torch.equal(trained.policy.parameters[name], value) for name, value in start.items())


def test_the_value_loss_reaches_a_shared_trunk_times_its_coefficient(make_run: MakeRun) -> None:
    """With advantages of zero the policy has no loss of its own, and with a huge adam_eps a step is lr·gradient/eps."""
    moved = []
    for factor in (1.0, 2.0):
        training = {"critic": {"kind": "head", "coefficient": factor}, "adam_eps": 1e3, "clip_norm": None, "lr": 1e3}
        objective = {"advantage": "letters_task:nothing", "placement": "none", "policy.dtype": "float64"}
        trained = pack(make_run(f"times{factor:g}", training, [objective]))
        assert trained.critics is not None
        with torch.no_grad():
            trained.critics.head.parameters["value.weight"].fill_(0.3)
        before = weights_of(trained.optimizer)
        trained.advance()
        moved.append({name: trained.policy.parameters[name].detach() - value for name, value in before.items()})
    assert bool(moved[0]["layers.0.qkv"].any())
    assert not bool(moved[0]["head"].any()), "the output layer takes no part in a value"
    for name, value in moved[0].items():
        torch.testing.assert_close(moved[1][name], 2 * value, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_moves_neither_policy_nor_critic(make_run: MakeRun, kind: str) -> None:
    run = make_run(training={"critic": {"kind": kind}}, objectives=[GAE], task={"reward": "nan"})
    trained = pack(run)
    assert trained.critics is not None
    before = {**weights_of(trained.optimizer), **weights_of(trained.critics.optimizer)}
    row = trained.advance()[0]
    assert (row["nonfinite"], row["value_loss"], row["explained_variance"]) == (True, None, None)
    after = {**weights_of(trained.optimizer), **weights_of(trained.critics.optimizer)}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert trained.diverged() == []
    with torch.no_grad():
        trained.critics.head.parameters["value.bias"].fill_(torch.inf)
    assert Pack.resumed(trained.members, [trained.state(0)]).diverged() == [0]


def exact_values(trained: Pack) -> dict[tuple[int, ...], float]:
    """V after every prefix of own tokens of the task `Word`, the empty one first, by listing all completions."""
    policy, task = trained.policy, trained.members[0].task
    (example,), (end,) = task.split("train"), policy.eos_token_ids
    prompt = policy.tokenizer(example.prompt, add_special_tokens=False)["input_ids"]

    def distribution(written: tuple[int, ...]) -> list[float]:
        steps = policy.decoder([[[*prompt, *written]]], 1)
        return steps.start([0])[0][0].double().softmax(-1).tolist()

    def value(written: tuple[int, ...]) -> float:
        if len(written) == 2 or end in written:
            kept = [token for token in written if token != end]
            return task.score(example, policy.tokenizer.decode(kept)).reward
        chances = distribution(written)
        return sum(p * value((*written, token)) for token, p in enumerate(chances))

    with torch.no_grad():
        return {written: value(written) for written in [(), *((t,) for t in range(policy.vocab_size) if t != end)]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_finds_the_values_of_its_policy(make_run: MakeRun, kind: str) -> None:
    """On one rollout of a policy that stays as it is, V goes to the mean return after each prefix, which is within
    four standard errors of the exact value: rewards differ by 1.2 at most, so that one is at most 0.6/√n."""
    critic = {"kind": kind, "lr": 0.02, "clip": None, **({"coefficient": 1.0} if kind == "head" else {})}
    training = {
        "critic": critic, "lr": 0.0, "prompts": 8, "group_size": 64, "updates": 120, "updates_per_rollout": 120,
        "schedule": "linear",
    }  # fmt: skip
    trained = pack(make_run(training=training, objectives=[{**GAE, "lam": 1.0}], task={"name": "letters_task:Word"}))
    assert trained.critics is not None
    rows = [trained.advance()[0] for _ in range(120)]
    fresh = pack(make_run("fresh", {"prompts": 8, "group_size": 64}, [GAE], task={"name": "letters_task:Word"}))
    fresh.collect_due_rollouts()
    experience = fresh.pending[0][0]
    trained.critics.compute_values([experience], trained.policy)
    rollout, rewards, found = experience.rollout, experience.rewards, experience.values
    truth, checked = exact_values(trained), 0
    assert found is not None
    for written, exact in truth.items():
        own = len(written)
        at = torch.tensor([rollout.tokens[n, :own].tolist() == list(written) for n in range(len(rewards))])
        at &= rollout.mask[:, own] if own < 2 else False
        if int(at.sum()) < 30:
            continue
        value, count = found[at, own], int(at.sum())
        assert float(value.std(correction=0)) < 1e-5
        assert float(value.mean()) == pytest.approx(float(rewards[at].mean()), abs=0.01)
        assert float(value.mean()) == pytest.approx(exact, abs=4 * 0.6 / count**0.5 + 0.01)
        checked += 1
    assert checked >= 4
    assert rows[-1]["value_loss"] < rows[0]["value_loss"]
    assert rows[-1]["explained_variance"] > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_ppo_with_a_critic_improves_over_its_start(make_run: MakeRun, kind: str) -> None:
    objective = {**GAE, "lam": 0.95, "whiten": "batch", "aggregation": "token_mean"}
    training = {"critic": {"kind": kind}, "updates": 80, "updates_per_rollout": 2, "prompts": 8, "evaluate_every": 80}
    run = finished(make_run(training=training, objectives=[objective], seeds=5))
    shares = []
    for identity in run.cells:
        rows = numbers(run, identity)["metrics"]
        start, end = (sum(row["reward_mean"] for row in part) / 4 for part in (rows[:4], rows[-4:]))
        assert end > start + 0.2
        shares.append(rows[-1]["value_loss"] / (0.5 * (0.5 * rows[-1]["reward_mean"] ** 2)))
    if kind == "model":  # better than V = 0, which has at least ½·mean², in most seeds: the last rollout is a small one
        assert statistics.median(shares) < 1
