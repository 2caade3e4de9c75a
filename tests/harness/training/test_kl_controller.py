"""Coefficients that follow the updates: β to a KL from the reference, the trust region's to one from the sampler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klab.grid import Cell, Objective
from klab.grid.schema.sections import (
    AdditionTask,
    BetaControl,
    Critic,
    EntropyControl,
    TinyPolicy,
    TrainingSection,
    TrustRegion,
)
from klab.harness.objective import LossCoefficients
from klab.harness.training import run_cells
from klab.harness.training.optim.kl_controller import coefficient_metrics, initial_coefficients, next_coefficients
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, numbers

CONTROLS: dict[str, dict[str, Any]] = {
    "beta": {"beta_control": {"target": 0.001}, "updates_per_rollout": 2},
    "trust": {"trust_region": {"target": 1e-4}, "updates_per_rollout": 2},
    "linear": {"beta_control": {"schedule": "linear", "end": 0.01, "updates": 4}},
    "cosine to 0": {"beta_control": {"schedule": "cosine"}, "updates_per_rollout": 2},
    "entropy": {"entropy_control": {"target": 5.0, "step": 0.02}, "updates_per_rollout": 2},
    "both, lagged": {"beta_control": {"target": 0.5}, "trust_region": {"coefficient": 0.3, "target": 0.1}, "lag": 2},
}


def cell(objective: Objective | None = None, **training: Any) -> Cell:
    return Cell(objective or Objective(), AdditionTask(), TinyPolicy(), TrainingSection(**training), 0)


def row(update: int = 1, k3: float | None = 0.0, kl: float | None = 0.0, nonfinite: bool = False) -> dict[str, Any]:
    return {"update": update, "k3": k3, "kl_behaviour": kl, "nonfinite": nonfinite}


def test_beta_follows_ziegler_by_hand() -> None:
    """Target 0.1, horizon 10: errors of +1 (clipped to 0.2), −0.1, −1 (clipped), 0, and one that is not finite."""
    controlled = cell(Objective(beta=0.5), beta_control=BetaControl(target=0.1))
    at, betas = initial_coefficients(controlled), []
    for update, k3 in enumerate((0.2, 0.09, 0.0, 0.1, None), start=1):
        betas.append(coefficient_metrics(controlled, at)["beta"])
        at = next_coefficients(controlled, at, row(update, k3))
    expected = [0.5, 0.5 * 1.02, 0.5 * 1.02 * 0.99, 0.5 * 1.02 * 0.99 * 0.98, 0.5 * 1.02 * 0.99 * 0.98]
    assert betas == pytest.approx(expected, rel=1e-15)
    assert coefficient_metrics(controlled, at)["beta"] == betas[-1]


@given(st.floats(0, 10), st.floats(1e-3, 10), st.floats(0.5, 100), st.floats(1e-3, 1e3))
def test_beta_moves_towards_the_target_and_never_far(k3: float, target: float, horizon: float, kl: float) -> None:
    controlled = cell(beta_control=BetaControl(target=target, horizon=horizon))
    after = next_coefficients(controlled, LossCoefficients(kl=kl), row(k3=k3)).kl / kl
    assert (after > 1) <= (k3 > target)
    assert (after < 1) <= (k3 < target)
    assert abs(after - 1) <= 0.2 / horizon * (1 + 1e-12)


def test_the_trust_region_doubles_and_halves_once_per_rollout() -> None:
    """Two epochs of two minibatches; the KL of the fourth update decides, with a target of 0.1: above 0.15, below
    0.0667."""
    controlled = cell(updates_per_rollout=2, minibatches=2, trust_region=TrustRegion(coefficient=3.0, target=0.1))
    at, found = initial_coefficients(controlled), []
    for last in (0.16, 0.14, 0.07, 0.06, None, 0.0):
        for place, kl in enumerate((0.0, 9.0, 9.0, last), start=1):
            at = next_coefficients(controlled, at, row(4 * len(found) + place, kl=kl))
        found.append(coefficient_metrics(controlled, at)["trust_coefficient"])
    assert found == [6.0, 6.0, 6.0, 3.0, 3.0, 1.5]


def test_the_trust_regions_coefficient_stays_within_a_thousandfold() -> None:
    controlled = cell(lag=1, trust_region=TrustRegion(coefficient=3.0, target=0.1))
    for kl, limit in ((1.0, 3.0 * 1024), (0.0, 3.0 / 1024)):
        at = initial_coefficients(controlled)
        for update in range(1, 30):
            at = next_coefficients(controlled, at, row(update, kl=kl))
        assert at.trust == limit


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ({"schedule": "linear"}, [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]),
        ({"schedule": "linear", "end": 0.7, "updates": 3}, [0.5, 0.6, 0.7, 0.7, 0.7, 0.7]),
        ({"schedule": "linear", "updates": 11}, [0.5, 0.45, 0.4, 0.35, 0.3, 0.25]),
        (
            {"schedule": "cosine", "end": 0.1, "updates": 5},
            [0.5, 0.1 + 0.2 * (1 + 0.5**0.5), 0.3, 0.1 + 0.2 * (1 - 0.5**0.5), 0.1, 0.1],
        ),
        ({"schedule": "cosine"}, [0.25 * (1 + math.cos(math.pi * n / 5)) for n in range(5)] + [0.0]),
    ],
)
def test_scheduled_betas_by_hand(control: dict[str, Any], expected: list[float]) -> None:
    """An update that was skipped, one without a token in the loss, and one of the critic alone count as well."""
    scheduled = cell(
        Objective(beta=0.5, advantage="gae"),
        updates=6,
        lag=1,
        beta_control=BetaControl(**control),
        critic=Critic(warmup_updates=1),
    )
    at, betas = initial_coefficients(scheduled), []
    for update in range(1, 7):
        betas.append(coefficient_metrics(scheduled, at)["beta"])
        made = row(update, k3=9.0, nonfinite=update == 2) | ({"loss_tokens": 0} if update == 3 else {})
        at = next_coefficients(scheduled, at, made)
    assert betas == pytest.approx(expected, rel=1e-15, abs=1e-17)
    assert betas[-1] == expected[-1]


def test_the_entropy_bonus_follows_skywork_by_hand() -> None:
    """Target 0.2, step 0.1 within [0, 0.25]: up at or below the target, down above; in the loss after an update that
    was at or below it."""
    control = EntropyControl(target=0.2, step=0.1, high=0.25)
    controlled = cell(Objective(entropy_bonus=0.05), entropy_control=control)
    at, applied, found = initial_coefficients(controlled), [], []
    for update, entropy in enumerate((0.3, 0.2, 0.1, 0.1, 0.5, None, 0.1), start=1):
        applied.append(coefficient_metrics(controlled, at)["entropy_coefficient"])
        at = next_coefficients(controlled, at, {**row(update), "entropy": entropy})
        found.append(at.entropy)
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.25, 0.15, 0.15, 0.25], rel=1e-12)
    assert applied == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.25, 0.0, 0.0], rel=1e-12)


@pytest.mark.parametrize("place", [{"nonfinite": True}, {"update": 2}], ids=["skipped", "the critic alone"])
def test_updates_that_did_not_move_the_policy_move_no_coefficient(place: dict[str, Any]) -> None:
    controlled = cell(
        Objective(advantage="gae"),
        lag=1,
        critic=Critic(warmup_updates=2),
        beta_control=BetaControl(target=0.1),
        trust_region=TrustRegion(target=0.1),
    )
    at = initial_coefficients(controlled)
    assert next_coefficients(controlled, at, row(**{"update": 3, "k3": 1.0, "kl": 1.0} | place)) == at
    assert next_coefficients(controlled, at, row(3, 1.0, 1.0)) == LossCoefficients(kl=1.02, trust=2.0)


def test_without_controls_nothing_moves_and_no_column_appears(make_run: MakeRun) -> None:
    assert coefficient_metrics(cell(), initial_coefficients(cell())) == {}
    assert next_coefficients(cell(), initial_coefficients(cell()), row(k3=9.0, kl=9.0)) == LossCoefficients(
        kl=1.0, trust=0.0
    )
    fixed = cell(lag=1, trust_region=TrustRegion(coefficient=2.0))
    assert next_coefficients(fixed, initial_coefficients(fixed), row(kl=9.0)) == LossCoefficients(kl=1.0, trust=2.0)


@pytest.mark.bits
@pytest.mark.parametrize("training", CONTROLS.values(), ids=CONTROLS.keys())
def test_resumed_is_undisturbed_and_packed_is_alone(make_run: MakeRun, training: dict[str, Any]) -> None:
    objectives = [{"beta": 0.5}, {"estimator": "k1", "placement": "reward_to_go", "beta": 0.1}]
    packed, broken = (make_run(name, training, objectives) for name in ("packed", "broken"))
    finished(packed)
    for identity in broken.cells:
        for updates in (1, 2, 2):
            assert run_cells(broken.path, [identity], stop=StopAfter(updates)) == {identity: "interrupted"}
        assert run_cells(broken.path, [identity]) == {identity: "finished"}
        assert_same(packed, broken, identity)
    moving = numbers(packed, packed.cells[0])["metrics"]
    sections = {"beta": "beta_control", "trust_coefficient": "trust_region", "entropy_coefficient": "entropy_control"}
    for column, section in sections.items():
        values = [each[column] for each in moving if column in each]
        assert len(values) == (6 if section in training else 0)
        assert not values or len(set(values)) > 1


@pytest.mark.bits
def test_cells_of_one_pack_may_differ_in_what_moves_their_coefficients(make_run: MakeRun) -> None:
    """One pack trains them all, and each has the bits that it has alone."""
    controls: list[dict[str, Any]] = [
        {"beta_control": {"schedule": "linear"}, "trust_region": {"target": 1e-4}},
        {"beta_control": {"schedule": "cosine", "end": 1.0}},
        {"beta_control": {"target": 0.001}},
        {"trust_region": {}},
        {},
    ]
    objectives = [
        {f"training.{name}": value for name, value in each.items()} | {"beta": 0.5, "training.lag": 1}
        for each in controls
    ]
    packed, alone = (make_run(name, {}, objectives) for name in ("packed", "alone"))
    members = [prepare_cell(packed, packed.cell(identity))[0] for identity in packed.cells]
    assert len({member.shape() for member in members}) == 1
    finished(packed)
    for identity in alone.cells:
        run_cells(alone.path, [identity])
        assert_same(packed, alone, identity)
    first = numbers(packed, packed.cells[0])["metrics"]
    assert [each["beta"] for each in first] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.0], rel=1e-14)


@pytest.mark.parametrize("placement", ["loss", "reward_to_go", "advantage"])
def test_a_scheduled_beta_scales_the_kl_term_exactly(make_run: MakeRun, placement: str) -> None:
    """The first update has the loss of a constant β; once β is 0, an update has that of a cell without a KL term."""
    common: dict[str, Any] = {"policy.dtype": "float64"}
    control = {"beta_control": {"schedule": "linear", "updates": 2}, "updates": 2}
    found: list[list[dict[str, Any]]] = []
    led_to: dict[str, torch.Tensor] = {}
    for name, training, objective in (
        ("moving", control, {"placement": placement, "beta": 0.3}),
        ("fixed", {"updates": 2}, {"placement": placement, "beta": 0.3}),
        ("without", {"updates": 2}, {"placement": "none"}),
    ):
        run = make_run(name, training, [{**common, **objective}])
        pack = Pack([prepare_cell(run, run.cell(run.cells[0]))[0]])
        if name == "without":  # from where the first update of the others led
            with torch.no_grad():
                for key, value in pack.policy.parameters.items():
                    value.copy_(led_to[key])
            pack.done = 1
        rows = [pack.advance()[0]]
        if name != "without":
            led_to = {key: value.detach().clone() for key, value in pack.policy.parameters.items()}
            rows += pack.advance()
        found.append(rows)
    moving, fixed, without = found
    assert moving[0]["loss"] == fixed[0]["loss"]
    assert moving[1]["beta"] == 0.0
    assert moving[1]["gradient_norm"] == pytest.approx(without[0]["gradient_norm"], rel=1e-12)
    assert fixed[1]["gradient_norm"] != pytest.approx(without[0]["gradient_norm"], rel=1e-6)


@pytest.mark.parametrize("placement", ["loss", "reward_to_go"])
def test_every_update_has_the_beta_that_the_rows_before_it_ask_for(make_run: MakeRun, placement: str) -> None:
    training = {"beta_control": {"target": 0.002, "horizon": 2.0}}
    run = finished(make_run("controlled", training, [{"estimator": "k3", "placement": placement, "beta": 0.3}]))
    rows = numbers(run, run.cells[0])["metrics"]
    beta = 0.3
    for each in rows:
        assert each["beta"] == pytest.approx(beta, rel=1e-14)
        beta *= 1 + max(-0.2, min(0.2, each["k3"] / 0.002 - 1)) / 2
    assert {round(each["beta"], 9) for each in rows} != {0.3}
    still = finished(make_run("still", {}, [{"estimator": "k3", "placement": placement, "beta": 0.3}]))
    fixed = numbers(still, still.cells[0])["metrics"]
    assert "beta" not in fixed[0]
    assert fixed[0]["loss"] == rows[0]["loss"]
    assert fixed[1]["loss"] != rows[1]["loss"]


def test_a_controller_at_rest_is_a_fixed_beta_to_the_bit(make_run: MakeRun) -> None:
    """With an endless horizon 1 + step/horizon is 1."""
    objective = {"estimator": "k3", "placement": "reward_to_go", "beta": 0.3}
    moving = finished(make_run("moving", {"beta_control": {"target": 0.1, "horizon": 1e300}}, [objective]))
    fixed = finished(make_run("fixed", {}, [objective]))
    mine, theirs = (numbers(run, run.cells[0])["metrics"] for run in (moving, fixed))
    assert [{k: v for k, v in each.items() if k != "beta"} for each in mine] == theirs
    assert {each["beta"] for each in mine} == {0.3}


def test_a_stronger_trust_region_keeps_the_policy_nearer_to_its_sampler(make_run: MakeRun) -> None:
    found = []
    for coefficient in (0.001, 1.0, 30.0):
        training = {"trust_region": {"coefficient": coefficient}, "updates_per_rollout": 6, "clip_norm": None}
        run = finished(
            make_run(f"times{coefficient:g}", training, [{"placement": "none", "weight": "ratio", "advantage": "raw"}])
        )
        rows = numbers(run, run.cells[0])["metrics"]
        assert rows[0]["kl_behaviour"] == pytest.approx(0.0, abs=1e-9)
        found.append(rows[-1]["kl_behaviour"])
    assert found == sorted(found, reverse=True)
    assert found[0] > 2 * found[2] > 0


@pytest.mark.bits
def test_micro_batches_have_the_gradient_of_the_whole(make_run: MakeRun) -> None:
    common = {
        "trust_region": {"coefficient": 2.0, "target": 1e-3}, "beta_control": {"target": 1e-3},
        "updates": 4, "updates_per_rollout": 2, "adam_eps": 1.0, "clip_norm": None, "lr": 0.3,
    }  # fmt: skip
    found = []
    for name, more in (("whole", {}), ("pieces", {"micro_batch": 6})):
        run = make_run(name, {**common, **more}, [{"policy.dtype": "float64", "beta": 0.2}])
        found.append(numbers(finished(run), run.cells[0])["metrics"])
    for whole, pieces in zip(*found, strict=True):
        for column in ("loss", "gradient_norm", "kl_behaviour", "k3", "beta", "trust_coefficient"):
            assert pieces[column] == pytest.approx(whole[column], rel=1e-11, abs=1e-12), column
