"""TRL's own scoring and loss on a probe: unbound trainer methods on a stand-in that answers what they ask for.

Nothing of the trainers' mathematics is repeated here. `_generate_and_score_completions` computes advantages (and RLOO's
KL in the reward) from the probe's rewards, `_compute_loss` the loss. The stand-in gives the probe's log-probabilities
in place of a model's: behaviour policy while scoring, current policy in the loss.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.parity.probe import BUDGET, Probe


class Model:
    """A name for a policy; the stand-in knows its log-probabilities."""

    training = True
    is_gradient_checkpointing = False


CURRENT, SAMPLER, REFERENCE = Model(), Model(), Model()


STAND_IN_DEFAULTS: dict[str, Any] = {
    "beta": 0.0,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "scale_rewards": "group",
    "use_bias_correction_kl": True,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "normalize_advantages": False,
    "off_policy_mask_threshold": None,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "vllm_importance_sampling_correction": False,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_clip_max": 3.0,
}
"""Settings of the two trainers that are compared; those of TRL but for the KL, which is off."""


def grpo_gradient(data: Probe, **settings: Any) -> Tensor:
    """Gradient of `GRPOTrainer`'s loss with respect to the tokens' log-probabilities, `[N, T]`."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = _stand_in(data, settings)
    trainer.get_off_policy_mask = GRPOTrainer.get_off_policy_mask
    trainer.get_gamma_weights = GRPOTrainer.get_gamma_weights
    trainer._generate = lambda prompts: (
        [[1]] * len(prompts),
        [[1] * int(n) for n in data.present.sum(1)],
        [row[here].long().tolist() for row, here in zip(data.own, data.present, strict=True)],
        [""] * len(prompts),
        None
        if data.sampled is None
        else [row[here].tolist() for row, here in zip(data.sampled, data.present, strict=True)],
        {},
        None,
        None,
    )
    scored = GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "p"}] * len(data.logp))
    scored["old_per_token_logps"] = data.behaviour
    return _differentiated(GRPOTrainer._compute_loss, trainer, scored, data)


def rloo_gradient(data: Probe, **settings: Any) -> Tensor:
    """Gradient of `RLOOTrainer`'s loss, `[N, T]`, on a probe without environment tokens."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    trainer = _stand_in(data, settings)
    trainer._generate = lambda prompts: (
        [[1]] * len(prompts),
        [[1] * int(n) for n in data.present.sum(1)],
        [""] * len(prompts),
    )
    scored = RLOOTrainer._generate_and_score_completions(trainer, [{"prompt": "p"}] * len(data.logp))
    return _differentiated(RLOOTrainer._compute_loss, trainer, scored, data)


def _differentiated(compute_loss: Any, trainer: SimpleNamespace, scored: dict[str, Any], data: Probe) -> Tensor:
    logp = data.logp.clone().requires_grad_()
    trainer.tokens[CURRENT] = logp
    loss = compute_loss(trainer, CURRENT, scored)
    return torch.autograd.grad(loss, logp)[0]


def _stand_in(data: Probe, settings: dict[str, Any]) -> SimpleNamespace:
    """What the two trainers read from themselves: their documented defaults, overridden by `settings`."""
    chosen = {**STAND_IN_DEFAULTS, **settings}
    arguments = SimpleNamespace(
        delta=chosen["delta"],
        use_bias_correction_kl=chosen["use_bias_correction_kl"],
        sapo_temperature_pos=chosen["sapo_temperature_pos"],
        sapo_temperature_neg=chosen["sapo_temperature_neg"],
        **{name: value for name, value in chosen.items() if name.startswith("vespo_")},
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=len(data.logp),
        gradient_checkpointing_kwargs=None,
    )
    tokens: dict[Any, Tensor] = {SAMPLER: data.behaviour, REFERENCE: data.reference}
    return SimpleNamespace(
        tokens=tokens,
        args=arguments,
        model=SAMPLER,
        ref_model=REFERENCE,
        _get_per_token_logps_and_entropies=lambda model, *_, **__: (tokens[model], torch.zeros_like(data.logp), None),
        _calculate_rewards=lambda *_: data.rewards[:, None].clone(),
        reward_weights=torch.ones(1, dtype=torch.float64),
        reward_funcs=[None],
        reward_func_names=["probe"],
        reward_clip_range=None,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            num_processes=1,
            process_index=0,
            sync_gradients=True,
            gather=lambda value: value,
            gather_for_metrics=lambda value: value,
            reduce=lambda value, reduction: value,
            unwrap_model=lambda model: model,
        ),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        eos_token_ids=[2],
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        environment_factories=None,
        environments=None,
        tools=None,
        use_vllm=data.sampled is not None,
        vllm_importance_sampling_correction=chosen["vllm_importance_sampling_correction"],
        vllm_importance_sampling_mode=chosen["vllm_importance_sampling_mode"],
        vllm_importance_sampling_clip_min=chosen["vllm_importance_sampling_clip_min"],
        vllm_importance_sampling_clip_max=chosen["vllm_importance_sampling_clip_max"],
        num_generations=data.size,
        num_generations_eval=data.size,
        num_iterations=2,
        current_gradient_accumulation_steps=1,
        max_completion_length=BUDGET,
        multi_objective_aggregation="sum_then_normalize",
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        off_policy_mask_threshold=chosen["off_policy_mask_threshold"],
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=False,
        log_multimodal=False,
        beta=chosen["beta"],
        epsilon_low=chosen["epsilon"],
        epsilon_high=chosen["epsilon"] if chosen["epsilon_high"] is None else chosen["epsilon_high"],
        loss_type=chosen["loss_type"],
        importance_sampling_level=chosen["importance_sampling_level"],
        scale_rewards=chosen["scale_rewards"],
        normalize_advantages=chosen["normalize_advantages"],
        _metrics=defaultdict(lambda: defaultdict(list)),
        _logs=defaultdict(lambda: defaultdict(list), {"prompt": [], "completion": [], "advantages": []}),
        _pending_extra_logs={},
        _pending_metrics={},
    )
