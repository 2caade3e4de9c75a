"""klab's gradients are TRL's, wherever the conventions can be set equal.

TRL's conventions, set on klab's side: group std with Bessel's correction and eps 1e-4.

Not compared, because no axis value says it: the mask of low-entropy tokens; and GMPO, whose trainer is experimental
(verl has it, too). The second importance ratio, between vLLM's sampler and the trainer, is compared in
`tests/harness/training/test_sampler_correction_trl.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from klab.grid import Objective
from klab.grid.algorithms import load_algorithm

trl = pytest.importorskip(
    "trl", reason="TRL is not installed: `make parity-test` installs trl==1.16.0 into its own environment"
)
if trl.__version__ != "1.16.0":
    pytest.skip(
        f"TRL {trl.__version__} is installed; parity is with 1.16.0 (`make parity-test`)", allow_module_level=True
    )

from klab.harness.export import Setting  # noqa: E402
from klab.harness.export.family import Family  # noqa: E402
from klab.harness.export.trl import FAMILIES, RLOO, trl_arguments  # noqa: E402
from tests.parity.probe import assert_same, klab_gradient, probe, relative_error  # noqa: E402
from tests.parity.trl_peer import STAND_IN_DEFAULTS, grpo_gradient, rloo_gradient  # noqa: E402

pytestmark = pytest.mark.parity

GROUP_NORM = {"name": "group_norm", "std": "sample", "eps": 1e-4}
BATCH_NORM = {"name": "group_center_batch_norm", "std": "sample", "eps": 1e-4}
PARAMETERS = {"beta": 0.3, "eps_low": 0.1, "eps_high": 0.15, "c": 1.6, "cap": 1.3, "tau_pos": 1.0, "tau_neg": 2.0}
PARAMETERS |= {"ceiling": 1.4, "drift": 0.02}
"""Of the points that are exported; TRL holds the temperatures in single precision, which has these."""
WIDE = {"name": "ppo_clip", "eps_low": 0.1, "eps_high": 0.15}


def grpo(**values: Any) -> Objective:
    return Objective(**{"placement": "none", "advantage": GROUP_NORM, **values})


CASES: dict[str, tuple[dict[str, Any], Objective]] = {
    "GRPO": (
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
        grpo(estimator="k3", placement={"name": "loss", "beta": 0.04}),
    ),
    "GRPO, rho k3": (
        {"loss_type": "grpo", "beta": 0.3},
        grpo(estimator="k3", placement={"name": "loss_corrected", "beta": 0.3}),
    ),
    "Dr. GRPO": (
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        grpo(advantage="group_center", aggregation="constant"),
    ),
    "DAPO": (
        {"loss_type": "dapo", "epsilon_high": 0.28},
        grpo(weight={"name": "ppo_clip", "eps_high": 0.28}, aggregation="token_mean"),
    ),
    "BNPO": ({"loss_type": "bnpo"}, grpo(aggregation="token_mean")),
    "Lite-PPO": (
        {"loss_type": "dapo", "scale_rewards": "batch"},
        grpo(advantage=BATCH_NORM, aggregation="token_mean"),
    ),
    "CISPO": (
        {"loss_type": "cispo", "epsilon_high": 1.3},
        grpo(weight={"name": "truncate", "cap": 1.3}, aggregation="token_mean"),
    ),
    "CISPO, cap 5": (
        {"loss_type": "cispo", "epsilon_high": 5.0},
        grpo(weight={"name": "truncate", "cap": 5.0}, aggregation="token_mean"),
    ),
    "SAPO": (
        {"loss_type": "sapo", "sapo_temperature_neg": 2.0},
        grpo(weight={"name": "sigmoid", "tau_neg": 2.0}),
    ),
    "GSPO": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        grpo(ratio="sequence_mean", weight={"name": "ppo_clip", "eps_low": 3e-4, "eps_high": 4e-4}, path="ratio"),
    ),
    "GSPO, wide clip": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.15},
        grpo(ratio="sequence_mean", weight=WIDE, path="ratio"),
    ),
    "GSPO, score path": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.15},
        grpo(ratio="sequence_mean", weight=WIDE, path="score"),
    ),
    "GSPO, token mean": (
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.15},
        grpo(ratio="sequence_mean", weight=WIDE, path="ratio", aggregation="token_mean"),
    ),
    "GSPO, s k3": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.1,
            "epsilon_high": 0.15,
            "beta": 0.3,
        },
        grpo(
            estimator="k3",
            placement={"name": "loss_corrected", "beta": 0.3},
            ratio="sequence_mean",
            weight=WIDE,
            path="ratio",
        ),
    ),
    "LUSPO": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.15},
        grpo(ratio="sequence_mean", weight=WIDE, path="ratio", aggregation="sequence_sum"),
    ),
    "INTELLECT-2 (delta = dual clip)": (
        {"loss_type": "dapo", "delta": 1.6, "beta": 0.001, "use_bias_correction_kl": False},
        grpo(
            estimator="k3",
            placement={"name": "loss", "beta": 0.001},
            weight={"name": "dual_clip", "c": 1.6},
            aggregation="token_mean",
        ),
    ),
}


@pytest.mark.parametrize("drift", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_a_named_algorithm_has_the_gradient_of_trl(name: str, drift: float) -> None:
    settings, objective = CASES[name]
    data = probe(drift=drift)
    assert_same(f"TRL {name}, drift {drift:g}", objective, data, grpo_gradient(data, **settings))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_point_that_is_exported_has_the_gradient_of_trl(family: Family) -> None:
    """The table of `klab.harness.export`: its settings, given to TRL's code, have the gradient of its objective."""
    worst, count = 0.0, 0
    for objective in family.points(**PARAMETERS):
        data = probe(drift=0.2, gaps=family.target != RLOO)
        peer = rloo_gradient if family.target == RLOO else grpo_gradient
        theirs = peer(data, **family.settings(objective))
        error = relative_error(klab_gradient(objective, data), theirs)
        assert error <= 1e-8, f"{objective}: {error:.2e}"
        worst, count = max(worst, error), count + 1
    print(f"{f'TRL, {family.name}: {count} exported points, worst':<60} {worst:.2e}")


@pytest.mark.parametrize("name", CASES)
def test_a_named_algorithm_is_exported_with_the_settings_that_were_compared(name: str) -> None:
    settings, objective = CASES[name]
    exported = trl_arguments(Setting(objective))
    assert not exported.differences
    theirs = {**STAND_IN_DEFAULTS, **settings}
    found = {**STAND_IN_DEFAULTS, **exported.settings}
    for side in (theirs, found):
        side["epsilon_high"] = side["epsilon"] if side["epsilon_high"] is None else side["epsilon_high"]
        if side["loss_type"] == "cispo":
            del side["epsilon"]
        if side["loss_type"] in ("dapo", "bnpo"):  # one where there is one micro-batch
            side["loss_type"] = "dapo"
        if side["beta"] == 0.0:
            del side["use_bias_correction_kl"]
    assert found == theirs


SHIPPED: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    "grpo_r1": {"loss_type": "grpo", "beta": 0.001, "use_bias_correction_kl": False, "epsilon": 10.0},
    "deepseek_v32": {"loss_type": "grpo", "beta": 0.04},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "lite_ppo": {"loss_type": "dapo", "scale_rewards": "batch"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 2e-3, "epsilon_high": 2.5e-3},
    "intellect_2": {"loss_type": "dapo", "delta": 4.0, "beta": 0.001, "use_bias_correction_kl": False},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_algorithm_is_trls_with_trls_std(name: str) -> None:
    written = dict(load_algorithm(name).objective)
    if written["advantage"] in ("group_norm", "group_center_batch_norm"):
        written |= {"std": "sample", "eps": 1e-4}
    data = probe(drift=0.2)
    assert_same(f"TRL, shipped {name}", Objective(**written), data, grpo_gradient(data, **SHIPPED[name]))


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("drift", [0.02, 0.2])
def test_rloo_has_the_gradient_of_trl(beta: float, drift: float) -> None:
    placement: Any = {"name": "reward", "beta": beta, "kl_scale": "sum", "kl_at": "rollout"} if beta else "none"
    objective = Objective(
        estimator="k1",
        placement=placement,
        ratio="sequence_product",
        weight="ppo_clip",
        advantage="leave_one_out",
        aggregation="sequence_sum",
    )
    data = probe(drift=drift, gaps=False)
    assert_same(f"TRL RLOO, beta {beta:g}, drift {drift:g}", objective, data, rloo_gradient(data, beta=beta))


def test_real_valued_rewards_and_a_reward_scale_change_nothing() -> None:
    data = probe(binary=False, scale=3.0)
    assert_same("TRL GRPO, normal rewards", grpo(), data, grpo_gradient(data, loss_type="grpo"))


def test_groups_of_four_differ_by_trls_single_precision_correction() -> None:
    """TRL divides two integer tensors for n/(n-1), which gives float32: 4/3 is off by 3e-8 whatever the type of the
    rewards."""
    data = probe(size=4)
    error = relative_error(klab_gradient(grpo(), data), grpo_gradient(data, loss_type="grpo"))
    print(f"{'TRL GRPO, groups of 4 (float32 Bessel correction)':<60} {error:.2e}")
    assert 1e-9 < error < 5e-8


@pytest.mark.parametrize("drift", [0.05, 0.4, 1.0])
def test_sapos_temperature_is_single_precision_in_trl(drift: float) -> None:
    """TRL chooses between two Python numbers with torch.where, which gives float32: 1.05 and 4/1.05 are off by 3e-8."""
    data = probe(drift=drift)
    theirs = grpo_gradient(data, loss_type="sapo")
    assert_same(f"TRL SAPO, tau 1.05 (float32), drift {drift:g}", grpo(weight="sigmoid"), data, theirs, 1e-7)


def test_the_wrong_std_or_eps_is_noticed() -> None:
    data = probe()
    theirs = grpo_gradient(data, loss_type="grpo")
    for advantage in (
        {"name": "group_norm", "std": "population", "eps": 1e-4},
        {"name": "group_norm", "std": "sample"},
    ):
        assert relative_error(klab_gradient(grpo(advantage=advantage), data), theirs) > 1e-5


def test_trl_whitens_reinforce_pp_over_sequences() -> None:
    """No klab setting: TRL's REINFORCE++ (RLOO with normalize_advantages) whitens leave-one-out advantages over
    sequences, klab's `batch_norm` whitens returns over own tokens, as the paper and verl do. The gradients differ."""
    data = probe(drift=0.02, gaps=False)
    objective = Objective(
        placement="none",
        ratio="sequence_product",
        advantage={"name": "batch_norm", "std": "sample"},
        aggregation="sequence_sum",
    )
    theirs = rloo_gradient(data, normalize_advantages=True)
    assert relative_error(klab_gradient(objective, data), theirs) > 1e-2
    assert torch.isfinite(theirs).all()
