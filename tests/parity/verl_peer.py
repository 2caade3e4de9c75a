"""verl's own advantages and losses on a probe: the registered functions of `core_algos`, composed as verl's actor does.

The composition (policy loss, then coefficient x aggregated KL loss) is `verl.workers.utils.losses.ppo_loss`, whose
batch of nested tensors a probe does not have; every function that computes something is verl's.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.parity.probe import BUDGET, Probe

ACTOR = "actor_rollout_ref.actor."


def token_rewards(data: Probe, beta: float = 0.0, estimator: str = "kl") -> Tensor:
    """Rewards of the tokens: the task's on the last own token, less verl's KL penalty of the rollout, `[N, T]`."""
    last = data.own & (data.own.cumsum(1) == data.own.sum(1, keepdim=True))
    scores = torch.where(last, data.rewards[:, None], 0.0)
    if not beta:
        return scores
    from verl.trainer.ppo.ray_trainer import apply_kl_penalty

    fields = {
        "response_mask": data.own.to(scores.dtype),
        "token_level_scores": scores,
        "old_log_probs": data.behaviour,
        "ref_log_prob": data.reference,
    }
    batch = SimpleNamespace(batch=_Fields(fields, len(scores)))
    controller = SimpleNamespace(value=beta, update=lambda **_: None)
    apply_kl_penalty(batch, controller, kl_penalty=estimator)
    return batch.batch["token_level_rewards"]


class _Fields(dict[str, Any]):
    """A batch of named tensors that knows its size."""

    def __init__(self, fields: dict[str, Any], size: int) -> None:
        super().__init__(fields)
        self.batch_size = (size,)


def verl_advantages(data: Probe, estimator: str, rewards: Tensor | None = None, **arguments: Any) -> Tensor:
    """Advantages `[N, T]` of a registered estimator."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    rewards = token_rewards(data) if rewards is None else rewards
    compute = get_adv_estimator_fn(estimator)
    mask = data.own.to(rewards.dtype)
    if estimator == "remax":
        return compute(rewards, data.greedy, mask)[0]
    if estimator == "reinforce_plus_plus":
        return compute(rewards, mask, config=SimpleNamespace(gamma=1.0))[0]
    return compute(rewards, mask, index=np.asarray(data.groups), **arguments)[0]


def verl_gradient(
    data: Probe,
    advantages: Tensor,
    *,
    loss_mode: str = "vanilla",
    aggregation: str = "token-mean",
    scale_factor: int | None = None,
    kl: str | None = None,
    kl_coefficient: float = 0.0,
    weights: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Gradient of verl's actor loss with respect to the tokens' log-probabilities, `[N, T]`."""
    from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
    from verl.workers.config import ActorConfig, OptimizerConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=data.size,
        ppo_micro_batch_size_per_gpu=1,
        optim=OptimizerConfig(lr=1e-6),
        loss_agg_mode=aggregation,
        **settings,
    )
    mask = data.own.to(data.logp.dtype)
    information = {
        "dp_size": 1,
        "batch_num_tokens": mask.sum(),
        "global_batch_size": len(mask),
        "loss_scale_factor": scale_factor,
    }
    config.global_batch_info.update(information)
    logp = data.logp.clone().requires_grad_()
    loss = get_policy_loss_fn(loss_mode)(
        old_log_prob=data.behaviour,
        log_prob=logp,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode=aggregation,
        config=config,
        rollout_is_weights=weights,
    )[0]
    if kl is not None:
        estimate = kl_penalty(logprob=logp, ref_logprob=data.reference, kl_penalty=kl)
        loss = loss + kl_coefficient * agg_loss(estimate, mask, aggregation, **information)
    return torch.autograd.grad(loss, logp)[0]


def _corrected(data: Probe, settings: dict[str, Any]) -> tuple[Probe, Tensor | None]:
    """The probe with verl's response mask after rejection, and its weights of the tokens."""
    if not settings:
        return data, None
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    assert data.sampled is not None
    weights, mask, _ = compute_rollout_correction_and_rejection_mask(
        data.behaviour, data.sampled, data.own.double(), **settings
    )
    return replace(data, own=mask.bool()), None if weights is None else weights.batch["rollout_is_weights"]


def exported_gradient(data: Probe, overrides: dict[str, Any], values: Tensor | None = None) -> Tensor:
    """Gradient of verl's actor loss under overrides of its configuration, as `klab export` writes them, `[N, T]`.

    Args:
        values: a critic's, for the estimator `gae`.
    """
    actor = {key.removeprefix(ACTOR): value for key, value in overrides.items() if key.startswith(ACTOR)}
    algorithm = {key.removeprefix("algorithm."): value for key, value in overrides.items() if "algorithm." in key}
    correction = {
        key.removeprefix("rollout_correction."): algorithm.pop(key)
        for key in list(algorithm)
        if key.startswith("rollout_correction.")
    }
    rewards = token_rewards(data)  # before the correction, as in `RayPPOTrainer.fit`
    data, weights = _corrected(data, correction)
    if algorithm.pop("use_kl_in_reward"):
        rewards = token_rewards(data, algorithm.pop("kl_ctrl.kl_coef"), algorithm.pop("kl_penalty"))
    estimator = algorithm.pop("adv_estimator")
    if estimator == "gae":
        from verl.trainer.ppo.core_algos import compute_gae_advantage_return

        assert values is not None
        mask = data.own.to(values.dtype)
        advantages = compute_gae_advantage_return(rewards, values, mask, algorithm.pop("gamma"), algorithm.pop("lam"))[
            0
        ]
    else:
        algorithm.pop("gamma", None)
        if estimator == "grpo_passk":
            algorithm = {"config": dict(algorithm)}
        advantages = verl_advantages(data, estimator, rewards, **algorithm)
    kl = {}
    if actor.pop("use_kl_loss"):
        kl = {"kl": actor.pop("kl_loss_type"), "kl_coefficient": actor.pop("kl_loss_coef")}
    return verl_gradient(
        data,
        advantages,
        loss_mode=actor.pop("policy_loss.loss_mode"),
        aggregation=actor.pop("loss_agg_mode"),
        scale_factor=BUDGET,
        weights=weights,
        **kl,
        **actor,
    )
