"""klab's gradients are verl's, wherever the conventions can be set equal.

verl's conventions, set on klab's side: group std with Bessel's correction and eps 1e-6, dual clip (c = 3) in every PPO
loss. verl's sequence means divide by H + 1e-8, which leaves a relative difference below 1e-8 / 3 for the lengths of the
probes.

Not compared, because no axis value says it: clip_cov and kl_cov (random or covariance masks) and dro. `full` is not
implemented in verl. What both have of 2025 and 2026 is in `test_values_2026.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
from torch import Tensor

from klab.grid import Cell, Objective, UserError
from klab.grid.schema.sections import AdditionTask, BetaControl, Rejection, Sampler, TinyPolicy, TrainingSection

try:
    installed = version("verl")
except PackageNotFoundError:
    pytest.skip(
        "verl is not installed: `make parity-test` installs verl==0.9.1 into its own environment",
        allow_module_level=True,
    )
if installed != "0.9.1":
    pytest.skip(f"verl {installed} is installed; parity is with 0.9.1 (`make parity-test`)", allow_module_level=True)

from klab.harness.export import Setting
from klab.harness.export.family import Family
from klab.harness.export.verl import FAMILIES, verl_overrides
from klab.harness.objective import update_context, value_loss, value_metrics
from klab.harness.training.data.sampler_mismatch import kept_tokens
from tests.parity.probe import BUDGET, WIDTH, Probe, assert_same, klab_gradient, probe, relative_error
from tests.parity.verl_peer import exported_gradient, token_rewards, verl_advantages, verl_gradient

pytestmark = pytest.mark.parity

GROUP_NORM = {"name": "group_norm", "std": "sample", "eps": 1e-6}
DUAL = {"name": "dual_clip", "c": 3.0}
PARAMETERS = {"beta": 0.3, "eps_low": 0.1, "eps_high": 0.15, "c": 1.6, "cap": 1.3, "gamma": 0.97, "lam": 0.9}
PARAMETERS |= {"tv_low": 0.02, "tv_high": 0.04, "kl_low": 0.01, "kl_high": 0.02, "truncation": 1.5}
PARAMETERS |= {"clip_low": 0.3, "clip_high": 0.4}
"""Of the points that are exported."""
UNREACHABLE = 1e9
"""A dual-clip bound that no ratio reaches: plain PPO clipping."""


def verl(**values: Any) -> Objective:
    return Objective(**{"placement": "none", "weight": DUAL, "advantage": GROUP_NORM, **values})


CASES: dict[str, tuple[dict[str, Any], Objective]] = {
    "GRPO": (
        {"aggregation": "seq-mean-token-mean", "kl": "low_var_kl", "kl_coefficient": 0.04},
        verl(estimator="k3", placement={"name": "loss", "beta": 0.04}),
    ),
    "GRPO without dual clip": (
        {"aggregation": "seq-mean-token-mean", "clip_ratio_c": UNREACHABLE},
        verl(weight="ppo_clip"),
    ),
    "Dr. GRPO": (
        {"norm_adv_by_std_in_grpo": False, "aggregation": "seq-mean-token-sum-norm", "scale_factor": BUDGET},
        verl(advantage="group_center", aggregation="constant"),
    ),
    "DAPO": (
        {"clip_ratio_high": 0.28},
        verl(weight={**DUAL, "eps_high": 0.28}, aggregation="token_mean"),
    ),
    "dual clip, c = 1.5": (
        {"clip_ratio_c": 1.5},
        verl(weight={"name": "dual_clip", "c": 1.5}, aggregation="token_mean"),
    ),
    "seq-mean-token-sum": (
        {"aggregation": "seq-mean-token-sum"},
        verl(aggregation="sequence_sum"),
    ),
    "GSPO": (
        {"loss_mode": "gspo", "aggregation": "seq-mean-token-mean", "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
        verl(ratio="sequence_mean", weight={"name": "ppo_clip", "eps_low": 3e-4, "eps_high": 4e-4}),
    ),
    "GSPO, wide clip": (
        {"loss_mode": "gspo", "aggregation": "seq-mean-token-mean", "clip_ratio_low": 0.1, "clip_ratio_high": 0.15},
        verl(ratio="sequence_mean", weight={"name": "ppo_clip", "eps_low": 0.1, "eps_high": 0.15}),
    ),
    "GSPO, ratio path": (
        {"loss_mode": "gspo", "aggregation": "seq-mean-token-mean", "clip_ratio_low": 0.1, "clip_ratio_high": 0.15},
        verl(ratio="sequence_mean", weight={"name": "ppo_clip", "eps_low": 0.1, "eps_high": 0.15}, path="ratio"),
    ),
    "CISPO (1 - .2, 1 + .2)": (
        {"loss_mode": "cispo"},
        verl(weight="clamp", aggregation="token_mean"),
    ),
    "CISPO as MiniMax (cap 5)": (
        {"loss_mode": "cispo", "clip_ratio_low": 1.0, "clip_ratio_high": 4.0},
        verl(weight={"name": "truncate", "cap": 5.0}, aggregation="token_mean"),
    ),
    "SAPO": (
        {"loss_mode": "sapo", "aggregation": "seq-mean-token-mean"},
        verl(weight="sigmoid"),
    ),
}


@pytest.mark.parametrize("drift", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_a_named_algorithm_has_the_gradient_of_verl(name: str, drift: float) -> None:
    settings, objective = CASES[name]
    settings = dict(settings)
    data = probe(drift=drift)
    advantages = verl_advantages(data, "grpo", norm_adv_by_std_in_grpo=settings.pop("norm_adv_by_std_in_grpo", True))
    assert_same(f"verl {name}, drift {drift:g}", objective, data, verl_gradient(data, advantages, **settings))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.name}, {family.axes['path'][0]} path")
def test_every_point_that_is_exported_has_the_gradient_of_verl(family: Family) -> None:
    """The table of `klab.harness.export`: its settings, given to verl's code, have the gradient of its objective."""
    data = probe(drift=0.2, binary=False, scale=10.0)  # verl's 1e-8 beside a variance well above 1
    data = replace(data, behaviour=data.behaviour.clamp(max=-0.01))  # probabilities below 1
    values = critic_values(1) if "gae" in family.axes["advantage"] else None
    worst, count = 0.0, 0
    for objective in family.points(**PARAMETERS):
        theirs = exported_gradient(data, family.settings(objective), values)
        error = relative_error(klab_gradient(objective, data.with_values(values)), theirs)
        assert error <= 1e-8, f"{objective}: {error:.2e}"
        worst, count = max(worst, error), count + 1
    print(f"{f'{family.name}: {count} exported points, worst':<60} {worst:.2e}")


AGGREGATIONS: dict[str, tuple[str, int | None]] = {
    "sequence_mean": ("seq-mean-token-mean", None),
    "token_mean": ("token-mean", None),
    "constant": ("seq-mean-token-sum-norm", BUDGET),
    "sequence_sum": ("seq-mean-token-sum", None),
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("estimator", "theirs"), {"k1": "k1", "k2": "k2", "k3": "k3", "abs": "abs", "k3_plus": "k3+"}.items()
)
def test_every_kl_loss_with_every_aggregation(estimator: str, theirs: str, aggregation: str) -> None:
    mode, factor = AGGREGATIONS[aggregation]
    data = probe(drift=0.4)
    objective = verl(estimator=estimator, placement={"name": "loss", "beta": 0.5}, aggregation=aggregation)
    gradient = verl_gradient(
        data, verl_advantages(data, "grpo"), aggregation=mode, scale_factor=factor, kl=theirs, kl_coefficient=0.5
    )
    assert_same(f"verl {theirs} as loss, {mode}", objective, data, gradient)


def in_reward(estimator: str, placement: str, advantage: Any, **values: Any) -> Objective:
    charged = {"name": placement, "beta": 0.05, "kl_scale": "sum", "kl_at": "rollout"}
    return verl(estimator=estimator, placement=charged, advantage=advantage, aggregation="token_mean", **values)


@pytest.mark.parametrize(("estimator", "theirs"), {"k1": "kl", "k2": "mse", "k3": "low_var_kl", "abs": "abs"}.items())
@pytest.mark.parametrize(
    ("advantage", "name"),
    [(GROUP_NORM, "grpo"), ("leave_one_out", "rloo"), ("greedy_baseline", "remax"), ("length_baseline", "opo")],
    ids=["grpo", "rloo", "remax", "opo"],
)
def test_kl_in_the_reward(advantage: Any, name: str, estimator: str, theirs: str) -> None:
    data = probe(drift=0.3)
    rewards = token_rewards(data, 0.05, theirs)
    placement = "reward_to_go" if name == "remax" else "reward"
    gradient = verl_gradient(data, verl_advantages(data, name, rewards))
    assert_same(f"verl {name}, {theirs} in reward", in_reward(estimator, placement, advantage), data, gradient)


def test_opo_has_the_gradient_of_verl() -> None:
    data = probe(drift=0.3)
    gradient = verl_gradient(data, verl_advantages(data, "opo"))
    assert_same("verl OPO", verl(advantage="length_baseline", aggregation="token_mean"), data, gradient)


def test_reinforce_pp_has_the_gradient_of_verl() -> None:
    """verl whitens with rsqrt(var + 1e-8), klab divides by std + eps: with eps = 0 the two differ by 5e-9 / var, so
    that the rewards here have a variance well above 1."""
    data = probe(drift=0.3, binary=False, scale=10.0)
    objective = in_reward("k1", "reward_to_go", {"name": "batch_norm", "std": "sample", "eps": 0.0})
    gradient = verl_gradient(data, verl_advantages(data, "reinforce_plus_plus", token_rewards(data, 0.05)))
    assert_same("verl REINFORCE++", objective, data, gradient)


def test_reinforce_pp_with_small_rewards_differs_by_verls_epsilon() -> None:
    data = probe(drift=0.3)
    objective = in_reward("k1", "reward_to_go", {"name": "batch_norm", "std": "sample", "eps": 0.0})
    gradient = verl_gradient(data, verl_advantages(data, "reinforce_plus_plus", token_rewards(data, 0.05)))
    assert_same("verl REINFORCE++, 0/1 rewards (eps inside the root)", objective, data, gradient, 1e-7)


def whitened_group_center(returns: Any) -> torch.Tensor:
    """REINFORCE++-baseline as verl has it: r - mean_G, then whitened over all own tokens; a user's own axis value."""
    mean, _ = returns.group_mean_and_std(returns.trajectory_returns, returns.has_tokens)
    centred = (returns.trajectory_returns - mean).expand_as(returns.mask)
    values = centred[returns.mask]
    return (centred - values.mean()) / values.std()


def test_reinforce_pp_baseline_has_the_gradient_of_verl_through_an_own_axis_value() -> None:
    """klab's `group_center_batch_norm` divides by the std of the update's returns (Lite-PPO); verl's
    REINFORCE++-baseline whitens the centred rewards over *tokens*, long trajectories weighing more. That is one
    function, named by its import path."""
    data = probe(drift=0.3, binary=False, scale=10.0)
    objective = verl(advantage="tests.parity.test_verl:whitened_group_center", aggregation="token_mean")
    gradient = verl_gradient(data, verl_advantages(data, "reinforce_plus_plus_baseline"))
    assert_same("verl REINFORCE++-baseline (own axis value)", objective, data, gradient)


def test_reinforce_pp_baseline_is_parallel_to_group_center_batch_norm_for_equal_lengths() -> None:
    data = probe(drift=0.3, gaps=False, equal_lengths=True)
    objective = verl(advantage={"name": "group_center_batch_norm", "eps": 0.0}, aggregation="token_mean")
    ours, theirs = (
        klab_gradient(objective, data),
        verl_gradient(data, verl_advantages(data, "reinforce_plus_plus_baseline")),
    )
    scale = float((ours * theirs).sum() / theirs.square().sum())
    error = relative_error(ours / scale, theirs)
    print(f"{'verl REINFORCE++-baseline, equal lengths, up to scale':<60} {error:.2e}  (scale {scale:.4f})")
    assert error < 1e-8
    assert abs(scale - 1) > 1e-3


@pytest.mark.parametrize("whiten", ["none", "batch"])
def test_the_critics_advantages_and_targets_are_verls(whiten: str) -> None:
    """verl whitens GAE's advantages always; its returns minus values are the advantages before."""
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    data, values = probe(drift=0.3), critic_values(1)
    mask = data.own.to(values.dtype)
    whitened, returns = compute_gae_advantage_return(token_rewards(data, 0.05), values, mask, 0.97, 0.9)
    placement = {"name": "reward_to_go", "beta": 0.05, "kl_scale": "sum"}
    advantage = {"name": "gae", "gamma": 0.97, "lam": 0.9, "whiten": whiten}
    objective = verl(estimator="k1", placement=placement, advantage=advantage)
    ours = update_context(objective, data.batch(data.logp).replace(values=values))
    assert ours.value_targets is not None
    wanted = (returns - values) if whiten == "none" else whitened
    errors = relative_error(ours.advantages, wanted * mask), relative_error(ours.value_targets, returns * mask)
    print(f"{f'verl GAE, whitening {whiten}: advantages, targets':<60} {errors[0]:.2e} {errors[1]:.2e}")
    assert max(errors) <= 1e-8


def critic_values(seed: int) -> Tensor:
    return torch.randn(probe().logp.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_clipped_value_loss_is_verls() -> None:
    from verl.trainer.ppo.core_algos import compute_value_loss

    data = probe()
    old, moved, targets = critic_values(1), critic_values(2), critic_values(3)
    found = []
    for theirs in (False, True):
        values = (old + 0.5 * moved).requires_grad_()
        if theirs:
            loss, clipped = compute_value_loss(values, targets, old, data.own.to(values.dtype), 0.2)
        else:
            totals = update_context(verl(), data.batch(data.logp)).totals
            loss = value_loss(values, old, targets, data.own, totals, 0.2)
            clipped = value_metrics(values.detach(), old, targets, data.own, 0.2)["value_clip_fraction"]
        found.append((loss.detach(), float(clipped), torch.autograd.grad(loss, values)[0]))
    error = relative_error(found[0][2], found[1][2])
    print(f"{'verl clipped value loss':<60} {error:.2e}")
    assert error <= 1e-8
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-8)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)
    assert found[0][1] > 0.1


def test_an_adaptive_beta_is_verls() -> None:
    from verl.trainer.ppo.core_algos import AdaptiveKLController

    from klab.harness.training.optim.kl_controller import coefficient_metrics, initial_coefficients, next_coefficients

    theirs = AdaptiveKLController(0.05, target_kl=0.1, horizon=25.0)
    training = TrainingSection(beta_control=BetaControl(target=0.1, horizon=25.0))
    cell = Cell(verl(placement={"name": "loss", "beta": 0.05}), AdditionTask(), TinyPolicy(), training, 0)
    ours = initial_coefficients(cell)
    for update, kl in enumerate((0.3, 0.11, 0.1, 0.095, 0.0, 0.02), start=1):
        theirs.update(kl, n_steps=1)
        ours = next_coefficients(cell, ours, {"update": update, "k3": kl, "kl_behaviour": 0.0, "nonfinite": False})
        assert coefficient_metrics(cell, ours)["beta"] == pytest.approx(theirs.value, rel=1e-14)


def far_reference() -> Probe:
    """A probe with one token whose reference probability is 40 times the policy's: k3 = 36 there."""
    data = probe(drift=0.1)
    data.reference[0, 0] = data.logp[0, 0] + 3.7
    return data


def test_verl_drops_the_gradient_of_a_large_k3_and_klab_does_not() -> None:
    """No klab setting: verl clamps k3 at 10, so that its gradient vanishes once ref/pi exceeds about 13."""
    data = far_reference()
    objective = verl(estimator="k3", placement={"name": "loss", "beta": 0.5}, aggregation="token_mean")
    theirs = verl_gradient(data, verl_advantages(data, "grpo"), kl="k3", kl_coefficient=0.5)
    ours = klab_gradient(objective, data)
    assert relative_error(ours, theirs) > 1e-2
    ours[0, 0] = theirs[0, 0]
    assert relative_error(ours, theirs) <= 1e-8


def test_the_default_scale_of_verls_constant_is_the_padded_width() -> None:
    data = probe()
    objective = verl(advantage="group_center", aggregation="constant")
    advantages = verl_advantages(data, "grpo", norm_adv_by_std_in_grpo=False)
    theirs = verl_gradient(data, advantages, aggregation="seq-mean-token-sum-norm")
    assert relative_error(klab_gradient(objective, data) * BUDGET / WIDTH, theirs) <= 1e-8


CORRECTIONS: tuple[dict[str, Any], ...] = (
    {"correction": "tis", "cap": 1.3},
    {"correction": "icepop", "low": 0.7, "high": 1.4},
    {"correction": "tis", "cap": 1.3, "level": "sequence"},
    {"correction": "icepop", "low": 0.6, "high": 1.5, "level": "sequence"},
    {"reject": {"high": 1.1, "low": 0.85}},
    {"reject": {"high": 0.25, "divergence": "k3", "over": "sum"}},
    {"reject": {"high": 1.2}, "correction": "tis", "cap": 1.3},
    {"reject": {"high": 0.1, "divergence": "k2", "over": "max"}, "correction": "icepop", "low": 0.6, "high": 1.5},
)


@pytest.mark.parametrize("sampler", CORRECTIONS, ids=str)
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_a_correction_for_a_sampler_is_verls(aggregation: str, sampler: dict[str, Any]) -> None:
    """As it is exported: verl multiplies the surrogate, and nothing of the KL; what it rejects leaves its mask."""
    training = TrainingSection(updates_per_rollout=2, max_new_tokens=BUDGET, sampler=Sampler(**sampler))
    placement: Any = "none" if "reject" in sampler else {"name": "loss", "beta": 0.1}
    objective = verl(placement=placement, estimator="k1", aggregation=aggregation)
    if "reject" in sampler and aggregation == "token_mean":
        with pytest.raises(UserError, match=r"sampler\.reject"):
            verl_overrides(Setting(objective, training))
        return
    overrides = verl_overrides(Setting(objective, training)).settings
    kept = {key: value for key, value in overrides.items() if not re.search("optim|ppo_|grad_clip|loss_scale", key)}
    data = probe().drawn_by_another(0.3)
    gradient = exported_gradient(data, kept)
    assert_same(f"verl, {aggregation}, {sampler}"[:60], objective, data, gradient, sampler=Sampler(**sampler))
    assert relative_error(klab_gradient(objective, data), gradient) > 1e-2


@pytest.mark.parametrize("over", ["token", "sum", "mean", "max"])
@pytest.mark.parametrize("divergence", ["k1", "k2", "k3"])
def test_rejection_is_verls(divergence: str, over: str) -> None:
    """verl's bounds of k1 are on the ratio of the sampler to the trainer, klab's on its inverse."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_rejection_mask

    if (divergence, over) == ("k1", "max"):
        pytest.skip("verl has no seq_max_k1, and klab refuses it")
    data = probe().drawn_by_another(0.3)
    assert data.sampled is not None
    log_ratio = data.behaviour - data.sampled
    name = f"token_{divergence}" if over == "token" else f"seq_{over}_{divergence}"
    bounds = {"k1": (0.85, 1.1), "k2": (None, 0.04), "k3": (None, 0.05)}[divergence]
    if over == "sum":
        bounds = {"k1": (0.7, 1.3), "k2": (None, 0.2), "k3": (None, 0.25)}[divergence]
    low, high = bounds
    asked = f"{1 / high!r}_{1 / low!r}" if low else str(high)
    theirs, _ = compute_rollout_rejection_mask(log_ratio, data.own.double(), name, asked)
    reject = Rejection(divergence=divergence, over=over, high=high, low=low)  # type: ignore[arg-type]
    ours = kept_tokens(reject, torch.where(data.own, log_ratio, 0.0), data.own) & data.own
    print(f"{f'verl, rollout_rs {name}: kept':<60} {float(ours.sum() / data.own.sum()):.2f}")
    assert torch.equal(ours.double(), theirs.double())
    assert 0 < int(ours.sum()) < int(data.own.sum())
