"""Reference policies that move: what each rollout is compared with, to the same bits alone, packed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from klab.grid import UserError
from klab.harness.policy.load import load_policy
from klab.harness.store import Run
from klab.harness.training import checkpoint, run_cells
from klab.harness.training.data.rollouts import log_probabilities
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, numbers

RULES: dict[str, dict[str, Any]] = {
    "reset": {"reference": {"update_every": 2}},
    "trailing": {"reference": {"ema": 0.8}},
    "trailing, lagged rollouts of two updates": {
        "reference": {"ema": 0.5, "update_every": 2}, "updates_per_rollout": 2, "lag": 1,
    },
    "the policy that drew the rollout": {"reference": "rollout", "updates_per_rollout": 2, "lag": 1},
    "drawn from the reference itself": {
        "reference": {"update_every": 2}, "behaviour": "reference", "updates_per_rollout": 2,
    },
}  # fmt: skip
OBJECTIVES: list[dict[str, Any]] = [
    {"estimator": "k3", "placement": "loss", "beta": 0.5},
    {"estimator": "k1", "placement": "reward_to_go", "beta": 0.2},
]
FULL: dict[str, dict[str, Any]] = {
    "reset": {"reference": {"update_every": 2}, "updates_per_rollout": 2},
    "trailing": {"reference": {"ema": 0.8}},
    "the policy that drew the rollout": {"reference": "rollout", "updates_per_rollout": 3},
    "the policy itself": {"reference": "rollout"},
}


def pack_of(run: Run, *positions: int) -> Pack:
    members = [prepare_cell(run, run.cell(run.cells[position]))[0] for position in positions or (0,)]
    return Pack(members)


def weights_of(policy: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in policy.parameters.items()}


@pytest.mark.bits
@pytest.mark.parametrize("training", RULES.values(), ids=RULES.keys())
def test_resumed_is_undisturbed_and_packed_is_alone(make_run: MakeRun, training: dict[str, Any]) -> None:
    packed, broken = (make_run(name, training, OBJECTIVES) for name in ("packed", "broken"))
    finished(packed)
    for identity in broken.cells:
        for updates in (1, 2, 2):
            assert run_cells(broken.path, [identity], stop=StopAfter(updates)) == {identity: "interrupted"}
        assert run_cells(broken.path, [identity]) == {identity: "finished"}
        assert_same(packed, broken, identity)


@pytest.mark.bits
@pytest.mark.parametrize("training", FULL.values(), ids=FULL.keys())
def test_whole_distributions_resumed_and_packed(make_run: MakeRun, training: dict[str, Any]) -> None:
    objectives = [{"estimator": "full", "beta": 0.5}, {"estimator": "full", "beta": 0.1}]
    packed, broken = (make_run(name, training, objectives) for name in ("packed", "broken"))
    finished(packed)
    identity = broken.cells[0]
    for updates in (1, 2, 2):
        assert run_cells(broken.path, [identity], stop=StopAfter(updates)) == {identity: "interrupted"}
    assert run_cells(broken.path, [identity]) == {identity: "finished"}
    assert_same(packed, broken, identity)


@pytest.mark.bits
@pytest.mark.parametrize("engine", ["stacked", "transformers"])
@pytest.mark.parametrize("policy", [{"lora": {"rank": 2}}, {"dtype": "bfloat16"}], ids=["adapters", "16 bits"])
def test_adapters_and_16_bit_weights(make_run: MakeRun, policy: dict[str, Any], engine: str) -> None:
    rule = {"update_every": 2} if "lora" in policy else {"ema": 0.9}
    settings = {"policy": {**policy, "engine": engine}, "training": {"reference": rule, "lr": 1e-3}}
    packed, broken = (make_run(name, objectives=OBJECTIVES, **settings) for name in ("packed", "broken"))
    finished(packed)
    identity = broken.cells[1]
    assert run_cells(broken.path, [identity], stop=StopAfter(3)) == {identity: "interrupted"}
    assert run_cells(broken.path, [identity]) == {identity: "finished"}
    assert_same(packed, broken, identity)


def test_a_mean_by_hand_and_what_rollouts_are_compared_with(make_run: MakeRun) -> None:
    """Every second update ref ← 0.75·ref + 0.25·π; each rollout keeps the reference that it was drawn beside."""
    rule = {"reference": {"ema": 0.75, "update_every": 2}, "updates_per_rollout": 3}
    pack = pack_of(make_run("run", rule, [{"policy.dtype": "float64"}]))
    expected = weights_of(pack.policy)
    for update in range(1, 7):
        before = pack.reference if update % 3 == 1 else None
        if before is not None:
            looked_up = dict(weights_of(before))
        pack.advance()
        if update % 3:
            (pending,) = pack.pending
            start = load_policy(pack.settings.policy, pack.members[0].start, 1, "cpu")
            with torch.no_grad():
                for name, value in start.parameters.items():
                    value.copy_(looked_up[name])
            theirs = log_probabilities(start, [pending[0].rollout], 1.0)[0]
            torch.testing.assert_close(pending[0].reference_logprobs, theirs, rtol=0, atol=1e-12)
        if update % 2 == 0:
            now = weights_of(pack.policy)
            expected = {name: 0.75 * value + 0.25 * now[name] for name, value in expected.items()}
        for name, value in weights_of(pack.reference).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-14, atol=1e-15)
    assert any(not torch.equal(value, expected[name]) for name, value in weights_of(pack.start).items())


def test_a_reset_is_the_policy_to_the_bit_until_the_next(make_run: MakeRun) -> None:
    pack = pack_of(make_run("run", {"reference": {"update_every": 2}}, [{"beta": 0.3}]))
    held = weights_of(pack.policy)
    for update in range(1, 6):
        pack.advance()
        if update % 2 == 0:
            held = weights_of(pack.policy)
        assert all(torch.equal(value, held[name]) for name, value in weights_of(pack.reference).items())


def test_a_mean_of_16_bit_weights_moves_though_each_step_is_lost_in_16_bits(make_run: MakeRun) -> None:
    """100 moves by 0.01 of a difference of one part in 64: in bfloat16 none of them would change a weight."""
    pack = pack_of(make_run("run", {"reference": {"ema": 0.99}}, policy={"dtype": "bfloat16"}))
    assert pack.moving is not None
    name, before = next(iter(weights_of(pack.start).items()))
    pack.optimizer.masters[name].mul_(1 + 1 / 64)
    for update in range(1, 101):
        pack.moving.follow(update)
    expected = before.float() * (1 + (1 - 0.99**100) / 64)
    torch.testing.assert_close(pack.moving.weights[name], expected, rtol=1e-5, atol=1e-7)
    rounded: Any = pack.reference
    assert torch.equal(rounded.parameters[name], pack.moving.weights[name].bfloat16())
    assert not torch.equal(rounded.parameters[name], before)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_the_kl_to_the_policy_that_drew_the_rollout_is_that_to_the_behaviour_policy(
    make_run: MakeRun, estimator: str
) -> None:
    """Off-policy k3 of π to π_old with tokens of π_old; on-policy there is no KL and, but for k1, no gradient of it."""
    objective = {"estimator": estimator, "beta": 0.7, "policy.dtype": "float64"}
    reused = {"reference": "rollout", "updates_per_rollout": 3}
    run = finished(make_run("reused", reused, [objective]))
    for row in numbers(run, run.cells[0])["metrics"]:
        first = row["update"] % 3 == 1
        assert abs(row["k1"]) < 1e-12 if first else row["k2"] > 1e-9
    fresh = finished(make_run("fresh", {"reference": "rollout"}, [objective]))
    without = finished(make_run("without", {}, [{"placement": "none", "policy.dtype": "float64"}]))
    mine, theirs = (numbers(each, each.cells[0])["metrics"] for each in (fresh, without))
    assert all(row["k1"] == row["k2"] == row["k3"] == 0.0 for row in mine)
    if estimator != "k1":
        assert [row["reward_mean"] for row in mine] == [row["reward_mean"] for row in theirs]
        assert [row["gradient_norm"] for row in mine] == pytest.approx(
            [row["gradient_norm"] for row in theirs], rel=1e-9
        )


def test_the_policy_that_drew_is_the_reference_reset_where_rollouts_begin(make_run: MakeRun) -> None:
    """Two ways to the same numbers but for rounding: the sampler's log-probabilities, and those of a copy of it."""
    objective = {"estimator": "k3", "beta": 0.7, "policy.dtype": "float64"}
    found = []
    for name, rule in (("drew", "rollout"), ("reset", {"update_every": 3})):
        run = finished(make_run(name, {"reference": rule, "updates_per_rollout": 3}, [objective]))
        found.append(numbers(run, run.cells[0])["metrics"])
    for mine, theirs in zip(*found, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-9, abs=1e-12)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-9)


def test_evaluations_measure_kl_to_the_start_and_to_the_moving_reference(make_run: MakeRun) -> None:
    run = finished(make_run("run", {"reference": {"update_every": 4}, "evaluate_every": 1, "updates": 5}))
    fixed = finished(make_run("fixed", {"evaluate_every": 1, "updates": 5}))
    rows, others = (numbers(each, each.cells[0])["evaluations"] for each in (run, fixed))
    for row, other in zip(rows[:5], others, strict=False):  # until the first move nothing differs
        assert row["reverse_kl"] == other["reverse_kl"]
        assert row["moving_kl"] == pytest.approx(0.0 if row["update"] in (0, 4) else row["reverse_kl"], abs=1e-7)
    assert rows[4]["reverse_kl"] > 1e-3
    assert 0 < rows[5]["moving_kl"] != rows[5]["reverse_kl"]
    assert all("moving_kl" not in row for row in others)


def test_the_checkpoint_has_the_reference_and_nothing_of_a_fixed_one(make_run: MakeRun) -> None:
    settings = {"moving": {"reference": {"ema": 0.5}}, "fixed": {}, "drew": RULES["the policy that drew the rollout"]}
    for name, training in settings.items():
        run = make_run(name, training)
        run_cells(run.path, run.cells, stop=StopAfter(3))
        state = checkpoint.read(run.cell(run.cells[0]).checkpoint / checkpoint.FILE, run.cells[0], torch.device("cpu"))
        assert bool(state.reference) == (name == "moving")
        if state.reference:
            trained = {key.removeprefix("weight/") for key in state.optimizer if key.startswith("weight/")}
            assert set(state.reference) == trained


def test_a_reference_of_a_policy_that_stands_still_stands_still(make_run: MakeRun) -> None:
    """Means of equal weights are these weights to the bit: the KL stays exactly 0."""
    run = finished(make_run("still", {"reference": {"ema": 0.9}, "lr": 0.0}, [{"beta": 0.5}]))
    assert all(row["k3"] == pytest.approx(0.0, abs=1e-12) for row in numbers(run, run.cells[0])["metrics"])
    assert all(row["moving_kl"] == 0.0 for row in numbers(run, run.cells[0])["evaluations"])


def test_a_value_of_ones_own_that_asks_for_late_logits_is_refused_when_the_pack_begins(
    make_run: MakeRun, tmp_path: Path
) -> None:
    objective = {"estimator": "letters_task:whole_distribution"}
    run = make_run("late", {"reference": {"update_every": 1}, "updates_per_rollout": 2}, [objective])
    with pytest.raises(UserError, match=r"update_every.*within the 2 updates|within the 2 updates"):
        pack_of(run)
