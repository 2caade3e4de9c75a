"""The methods of 2025 and 2026 that TRL 1.16.0 and verl 0.9.1 have, against their own functions."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from klab.grid import Objective
from klab.harness.objective import TokenBatch, objective_loss, update_context
from tests.parity.probe import Probe, assert_same, probe
from tests.parity.verl_peer import token_rewards, verl_advantages, verl_gradient

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        find_spec("verl") is None or find_spec("trl") is None,
        reason="TRL and verl are not installed: `make parity-test` installs them into an environment of their own",
    ),
]

NORM: dict[str, Any] = {"std": "sample", "eps": 1e-6}
TRUST_REGIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dppo_tv": (
        {"loss_mode": "dppo_tv", "clip_ratio_low": 0.02, "clip_ratio_high": 0.04, "clip_ratio_c": 1.5},
        {"name": "dppo_tv", "tv_low": 0.02, "tv_high": 0.04, "truncation": 1.5},
    ),
    "dppo_kl": (
        {"loss_mode": "dppo_kl", "clip_ratio_low": 0.01, "clip_ratio_high": 0.02, "clip_ratio_c": 20.0},
        {"name": "dppo_kl", "kl_low": 0.01, "kl_high": 0.02, "truncation": 20.0},
    ),
}


def probabilities(**settings: Any) -> Probe:
    """A probe whose log-probabilities are all below 0."""
    data = probe(**settings)
    return dataclasses.replace(data, behaviour=data.behaviour.clamp(max=-0.01))


@pytest.mark.parametrize("drift", [0.05, 0.4])
@pytest.mark.parametrize("name", TRUST_REGIONS)
def test_trust_regions_of_probabilities(name: str, drift: float) -> None:
    settings, weight = TRUST_REGIONS[name]
    data = probabilities(drift=drift)
    objective = Objective(
        placement="none", weight=weight, advantage={"name": "group_norm", **NORM}, aggregation="token_mean"
    )
    left_out = objective_loss(objective, data.batch(data.logp)).token_stats.weight[data.own] == 0
    assert 0 < int(left_out.sum()) < len(left_out)
    assert_same(
        f"verl {name}, drift {drift:g}", objective, data, verl_gradient(data, verl_advantages(data, "grpo"), **settings)
    )


@pytest.mark.parametrize("drift", [0.1, 0.6])
def test_geometric_mean_of_clipped_ratios(drift: float) -> None:
    data = probe(drift=drift)
    objective = Objective(
        placement="none",
        ratio={"name": "clipped_mean", "clip_low": 0.3, "clip_high": 0.4},
        weight="ratio",
        path="ratio",
        advantage={"name": "group_norm", **NORM},
    )
    theirs = verl_gradient(
        data, verl_advantages(data, "grpo"), loss_mode="geo_mean", clip_ratio_low=0.3, clip_ratio_high=0.4
    )
    assert_same(f"verl geo_mean, drift {drift:g}", objective, data, theirs)


COVARIANCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # every candidate is dropped, so that the draw does not matter
    "clip_cov": (
        {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.2, "clip_cov_ub": 1.0},
        {"name": "clip_cov", "cov_share": 1.0, "cov_low": 0.2, "cov_high": 1.0, "eps_low": 0.1, "eps_high": 0.15},
    ),
    "kl_cov": (
        {"kl_cov_ratio": 0.15, "ppo_kl_coef": 0.7},
        {"name": "kl_cov", "cov_share": 0.15, "cov_penalty": 0.7},
    ),
}


@pytest.mark.parametrize("drift", [0.05, 0.4])
@pytest.mark.parametrize("name", COVARIANCES)
def test_tokens_of_large_covariance(name: str, drift: float) -> None:
    from verl.workers.config import PolicyLossConfig

    settings, weight = COVARIANCES[name]
    data = probe(drift=drift, binary=False)
    objective = Objective(
        placement="none", weight=weight, advantage={"name": "group_norm", **NORM}, aggregation="token_mean"
    )
    context = update_context(objective, data.batch(data.logp))
    (chosen,) = context.solved.values()
    assert 0 < int(chosen.sum()) < int(data.own.sum())
    theirs = verl_gradient(
        data,
        verl_advantages(data, "grpo"),
        loss_mode=name,
        clip_ratio_low=0.1,
        clip_ratio_high=0.15,
        policy_loss=PolicyLossConfig(loss_mode=name, **settings),
    )
    assert_same(f"verl {name}, drift {drift:g}", objective, data, theirs)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_trl_has_the_same_tokens_of_high_entropy(share: float) -> None:
    """TRL takes the quantile in single precision."""
    from trl import GRPOTrainer

    data = probe()
    entropy = torch.rand(*data.logp.shape, generator=torch.Generator().manual_seed(5)).double()
    device = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    device.pad_across_processes = lambda value, **_: value
    device.gather = lambda value: value
    kept = GRPOTrainer.get_high_entropy_mask(SimpleNamespace(accelerator=device), entropy, data.own, 1 - share)
    context = update_context(Objective(entropy_share=share), data.batch(data.logp).replace(entropy=entropy))
    assert context.high_entropy is not None
    assert torch.equal(context.high_entropy, kept)
    assert 0 < int(kept.sum()) < int(data.own.sum())


def _advantages(data: Probe, advantage: Any, **more: Any) -> Tensor:
    return update_context(
        Objective(placement="none", advantage=advantage), data.batch(data.logp).replace(**more)
    ).advantages


def _assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-8) -> None:
    assert float(theirs.norm()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("binary", [True, False])
def test_advantages_over_groups(binary: bool) -> None:
    data = probe(binary=binary)
    _assert_close(_advantages(data, "group_center_rescaled"), verl_advantages(data, "gpg"))
    theirs = verl_advantages(data, "grpo_passk", config={"norm_adv_by_std_in_grpo": True})
    _assert_close(_advantages(data, {"name": "best_of_group", **NORM}), theirs)
    _assert_close(_advantages(data, {"name": "term_norm", **NORM}), verl_advantages(data, "gdpo"))


def test_terms_normalised_apart() -> None:
    """verl keeps the terms in single precision."""
    data = probe(binary=False, gaps=False)
    terms = torch.stack([data.rewards, (data.logp.sum(1) > data.logp.sum(1).mean()).double()], 1)
    prompt = torch.ones(len(terms), 1, dtype=torch.long)
    fields = {"prompts": prompt, "attention_mask": torch.cat([prompt, data.present.long()], 1)}
    theirs = verl_advantages(
        data,
        "gdpo",
        config={"gdpo_reward_keys": ["first", "second"], "gdpo_reward_weights": [1.0, 0.5]},
        non_tensor_batch={"first": np.asarray(terms[:, 0]), "second": np.asarray(terms[:, 1])},
        batch=fields,
    )
    ours = _advantages(data, {"name": "term_norm", **NORM}, reward_terms=terms, term_weights=(1.0, 0.5))
    _assert_close(ours, theirs.double(), 1e-5)


def test_the_optimal_token_baseline() -> None:
    """Off-policy verl takes the probabilities of π_old, klab those of π: compared where they are the same."""
    data = probe(drift=0.0, gaps=False, binary=False)
    logits = torch.randn(*data.logp.shape, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    theirs = verl_advantages(
        data,
        "optimal_token_baseline",
        rewards=token_rewards(data),
        old_log_probs=data.logp,
        sum_pi_squared=logits.softmax(-1).square().sum(-1),
    )
    _assert_close(_advantages(data, "optimal_token_baseline", logits=logits, logits_reference=logits), theirs)


def _weight(objective: Objective, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    out = objective_loss(objective, batch)
    return out.token_stats.weight, out.token_stats.advantage


@pytest.mark.parametrize("drift", [0.05, 0.4])
def test_trl_has_the_same_kernel_and_the_same_mask_of_sequences(drift: float) -> None:
    from trl import GRPOTrainer

    data = probe(drift=drift)
    batch, own = data.batch(data.logp), data.own.double()
    advantage = {"name": "group_norm", **NORM}
    weight, advantages = _weight(
        Objective(placement="none", ratio="sequence_product", weight="gamma_kernel", advantage=advantage), batch
    )
    signs = advantages[:, :1] + advantages[:, 1:2]
    kernel = GRPOTrainer.get_gamma_weights(signs, data.logp - data.behaviour, own, None)
    torch.testing.assert_close(weight[data.own], kernel.expand_as(weight)[data.own], rtol=1e-8, atol=1e-12)

    unclipped = {"eps_low": 1.0, "eps_high": 1e9}
    masked, _ = _weight(
        Objective(
            placement="none", weight={"name": "sequence_kl_mask", "drift": 0.02, **unclipped}, advantage=advantage
        ),
        batch,
    )
    kept = GRPOTrainer.get_off_policy_mask(signs, data.logp, data.behaviour, own, 0.02)
    assert 0 < int(kept.sum()) < len(kept)
    assert torch.equal(masked[data.own] > 0, (kept > 0).expand_as(masked)[data.own])
