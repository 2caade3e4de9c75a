"""klab's plugin on verl: the gradient of verl's own losses where it has them, elsewhere klab's, through `ppo_loss`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from klab.grid import Objective, UserError, parse_grid
from klab.harness.store import Run

try:
    installed = version("verl")
except PackageNotFoundError:
    pytest.skip("verl is not installed (`make parity-test`)", allow_module_level=True)
if installed != "0.9.1":
    pytest.skip(f"verl {installed} is installed; parity is with 0.9.1", allow_module_level=True)

from klab.harness.export import verl_plugin
from klab.harness.export.verl import FAMILIES
from klab.harness.export.verl_cells import CELL, NAME, acting_placement, require_expressible
from tests.parity.probe import BUDGET, Probe, klab_gradient, probe, relative_error
from tests.parity.verl_peer import exported_gradient, token_rewards, verl_advantages, verl_gradient

pytestmark = pytest.mark.parity

CHARGED = {"k1": "k1", "k2": "k2", "k3": "k3", "abs": "abs", "k3_plus": "k3+"}
IN_REWARD = {"beta": 0.05, "kl_scale": "sum", "kl_at": "rollout"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "future mean, power, positions": {
        "placement": {"name": "reward_to_go", **IN_REWARD},
        "estimator": "k1",
        "ratio": "future_mean",
        "weight": {"name": "power", "q": 0.4},
        "advantage": "position_norm",
    },
    "k2 corrected, truncated prefixes": {
        "placement": {"name": "loss_corrected", "beta": 0.1},
        "estimator": "k2",
        "ratio": "prefix_product",
        "weight": {"name": "truncate", "cap": 1.3},
        "advantage": "leave_one_out",
        "aggregation": "token_mean",
        "path": "ratio",
    },
    "reweighted k1, masked sequences": {
        "placement": {"name": "loss_reweighted", "beta": 0.1},
        "estimator": "k1",
        "ratio": "sequence_product",
        "weight": {"name": "mask", "low": 0.3, "high": 3.0},
        "aggregation": "constant",
    },
    "KL in the advantage, as it is now": {
        "placement": {"name": "advantage", "beta": 0.1, "kl_at": "current"},
        "estimator": "k3",
        "weight": "ratio",
        "aggregation": "sequence_sum",
    },
    "KL in the advantage, of the rollout": {
        "placement": {"name": "advantage_to_go", "beta": 0.1, "kl_at": "rollout"},
        "estimator": "k1",
    },
    "reward and loss": {
        "placement": {"name": "reward_and_loss", **IN_REWARD},
        "estimator": "k3",
        "advantage": "batch_norm",
    },
    "rewarded log-ratio": {"placement": "log_ratio", "weight": "one", "advantage": "raw"},
    "DPPO": {"placement": "none", "weight": "dppo_tv", "advantage": "group_center"},
    "GMPO's clipped mean": {"placement": "none", "ratio": "clipped_mean", "weight": "ratio", "path": "ratio"},
    "RAFT++": {"placement": "none", "advantage": "positive"},
    "verl's k3 without its clamp": {"placement": {"name": "loss", "beta": 0.1}, "estimator": "k3"},
}


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an objective the one that the plugin trains, and registers the plugin with verl."""
    verl_plugin.register()

    def choose(objective: Objective) -> None:
        require_expressible(objective)
        monkeypatch.setattr(verl_plugin, "cell_objective", lambda: objective)

    return choose


def plugin_advantages(objective: Objective, data: Probe) -> Tensor:
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    rewards = token_rewards(data)
    if acting_placement(objective) in ("reward", "reward_to_go", "reward_and_loss"):
        rewards = token_rewards(data, objective.beta, CHARGED[objective.estimator])
    labels = [f"prompt {group}" for group in data.groups.tolist()]
    found, returns = get_adv_estimator_fn(NAME)(
        token_level_rewards=rewards, response_mask=data.own.double(), config=None, index=labels
    )
    assert torch.equal(found, returns)
    return found


def plugin_gradient(objective: Objective, data: Probe, cuts: int = 1, ranks: int = 1) -> Tensor:
    """Gradient of what verl's actor minimises with the plugin, `[N, T]`."""
    return actor_gradient(data, plugin_advantages(objective, data), cuts, ranks)


def actor_gradient(
    data: Probe,
    advantages: Tensor,
    cuts: int = 1,
    ranks: int = 1,
    loss_mode: str = NAME,
    kl_coefficient: float = 0.0,
) -> Tensor:
    """Gradient of verl's `ppo_loss`, in micro-batches, over ranks whose gradients are averaged, `[N, T]`."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import ActorConfig, OptimizerConfig, PolicyLossConfig
    from verl.workers.utils import losses

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=data.size,
        ppo_micro_batch_size_per_gpu=1,
        optim=OptimizerConfig(lr=1e-6),
        loss_scale_factor=BUDGET,
        use_kl_loss=True,
        kl_loss_coef=kl_coefficient,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
    )
    found = torch.zeros_like(data.logp)
    for rows in torch.arange(len(data.logp)).chunk(cuts * ranks):
        logp = data.logp[rows].clone().requires_grad_()
        present = data.present[rows]
        flat = torch.cat([torch.cat([row[here], row.new_zeros(1)]) for row, here in zip(logp, present, strict=True)])
        batch = TensorDict(
            {
                "prompts": torch.ones(len(rows), 1, dtype=torch.long),
                "responses": present.long(),
                "attention_mask": torch.cat([torch.ones(len(rows), 1), present], 1).long(),
                "response_mask": data.own[rows].long(),
                "old_log_probs": data.behaviour[rows],
                "ref_log_prob": data.reference[rows],
                "advantages": advantages[rows],
            },
            batch_size=[len(rows)],
        )
        tu.assign_non_tensor(
            batch, dp_size=ranks, batch_num_tokens=int(data.own.sum()), global_batch_size=len(data.logp)
        )
        loss, metrics = losses.ppo_loss(config, {"log_probs": flat}, batch)
        assert {"actor/pg_loss", "kl_loss"} <= set(metrics)
        found[rows] = torch.autograd.grad(loss, logp)[0] / ranks
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.name}, {family.axes['path'][0]} path")
def test_where_verl_has_an_objective_the_plugin_has_its_gradient(cell: Any, family: Any) -> None:
    data = probe(drift=0.2, binary=False, scale=10.0)
    data = replace(data, behaviour=data.behaviour.clamp(max=-0.01))  # probabilities below 1
    points = [*family.points(beta=0.3, eps_low=0.1, eps_high=0.15, c=1.6, cap=1.3)]
    worst = 0.0
    for objective in points[:: max(1, len(points) // 12)]:
        if objective.advantage in ("gae", "greedy_baseline"):
            with pytest.raises(UserError, match="advantage"):
                require_expressible(objective)
            continue
        cell(objective)
        theirs = exported_gradient(data, family.settings(objective))
        worst = max(worst, relative_error(plugin_gradient(objective, data), theirs))
    print(f"{f'plugin, {family.name}':<60} {worst:.2e}")
    assert worst <= 1e-8


@pytest.mark.parametrize("cuts", [(1, 1), (3, 1), (2, 2)], ids=["whole", "3 micro-batches", "2 ranks of 2"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_where_verl_has_none_it_has_klabs(cell: Any, name: str, cuts: tuple[int, int]) -> None:
    objective = Objective(**OBJECTIVES[name])
    cell(objective)
    data = probe(drift=0.3)
    error = relative_error(plugin_gradient(objective, data, *cuts), klab_gradient(objective, data))
    print(f"{f'plugin, {name}, {cuts}':<60} {error:.2e}")
    assert error <= 1e-10


def test_other_loss_modes_are_verls_own(cell: Any) -> None:
    cell(Objective(weight="power"))
    data = probe(drift=0.3)
    found = actor_gradient(data, verl_advantages(data, "grpo"), loss_mode="vanilla", kl_coefficient=0.5)
    wanted = verl_gradient(data, verl_advantages(data, "grpo"), kl="k3", kl_coefficient=0.5)
    assert relative_error(found, wanted) <= 1e-8


def test_a_loss_without_the_reference_is_refused(cell: Any) -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    data = probe()
    mask, config = data.own.double(), SimpleNamespace(global_batch_info={"dp_size": 1})
    given = (data.behaviour, data.logp, mask, mask)
    cell(Objective(placement={"name": "loss", "beta": 0.1}))
    with pytest.raises(RuntimeError, match="in the place of verl's ppo_loss"):
        get_policy_loss_fn(NAME)(*given, config=config)
    cell(Objective(placement="none"))
    assert torch.isfinite(get_policy_loss_fn(NAME)(*given, config=config)[0])


IMPORTED = """
import verl
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.workers.engine_workers import ppo_loss
from klab.harness.export.verl_plugin import cell_objective
assert get_adv_estimator_fn("klab") and get_policy_loss_fn("klab") and ppo_loss.verls
print(cell_objective().ratio)
"""


@pytest.mark.parametrize("named", ["algorithm", "cell"])
def test_verl_finds_the_plugin_by_itself(tmp_path: Path, named: str) -> None:
    assert [point.value for point in entry_points(group="verl.plugins")] == ["klab.harness.export.verl_plugin"]
    name = "gspo"
    if named == "cell":
        text = "name: one\ntask: {name: addition}\npolicy: {name: tiny}\nobjective: {algorithm: gspo}\n"
        text += "training: {updates_per_rollout: 2}\n"
        run = Run.create(tmp_path / "one", parse_grid(text, "one.yaml"))
        name = str(run.cell(run.cells[0]).path)
    environment = {**os.environ, CELL: name}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.split()[-1:] == ["sequence_mean"], done.stderr[-2000:]
