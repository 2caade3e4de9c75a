"""A cell as arguments of `trl.GRPOConfig`, TRL 1.16.

The correspondence is that of TRL's code, not of its documentation: comments say what decides it.
"""

from __future__ import annotations

from typing import Any

from klab.grid import UserError
from klab.grid.schema.sections import TrainingSection
from klab.harness.export.translation import (
    Export,
    Setting,
    Translation,
    overlong_differences,
    require_own_fresh_rollouts,
)


def trl(setting: Setting) -> Export:
    """Arguments of `trl.GRPOConfig`.

    Raises:
        UserError: naming the axis that TRL cannot express, and why.
    """
    translation = Translation(setting, "TRL")
    found: dict[str, Any] = {**_kl(translation), **_weight(translation), **_advantage(translation)}
    training = setting.training
    if training is not None:
        require_own_fresh_rollouts(training, "TRL")
        chosen, differences = _selection(training)
        translation.differences += differences
        found |= {
            **chosen,
            "learning_rate": training.lr,
            "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(training.schedule, training.schedule),
            "warmup_steps": training.warmup_updates,
            "weight_decay": training.weight_decay,
            "adam_beta1": training.adam_beta1,
            "adam_beta2": training.adam_beta2,
            "adam_epsilon": training.adam_eps,
            "max_grad_norm": training.clip_norm or 0.0,
            "max_steps": training.updates,
            "num_generations": training.group_size,
            "per_device_train_batch_size": training.prompts * training.group_size // training.minibatches,
            "steps_per_generation": training.minibatches,
            "num_iterations": training.updates_per_rollout,
            "temperature": training.temperature,
            "top_p": training.top_p,
        }
    if setting.max_new_tokens:
        found["max_completion_length"] = setting.max_new_tokens
    return Export(found, tuple(translation.differences))


def _selection(training: TrainingSection) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `trl.GRPOConfig`, and what they leave different.

    Raises:
        UserError: groups that leave the update or are replaced.
    """
    if training.equal_groups != "keep":
        raise UserError("TRL cannot express this cell: it trains on every group", key="training.equal_groups")
    found = {"mask_truncated_completions": True} if training.truncated == "mask" else {}
    return found, overlong_differences(training, "trl.rewards.get_softoverlong_differences_punishment")


def _kl(translation: Translation) -> dict[str, Any]:
    placement = translation.translate(
        "placement", {"none": "", "loss": "loss", "loss_corrected": "corrected"}, translation.objective.placement
    )
    if not placement:
        return {"beta": 0.0}
    if translation.active_value("estimator", "k3") != "k3":
        raise translation.refusal("estimator", "GRPOTrainer's KL is always k3")
    if placement == "corrected" and translation.active_value("ratio", "token") != "token":
        raise translation.refusal("ratio", "its corrected KL is multiplied by the token ratio")
    return {"beta": translation.objective.beta, "use_bias_correction_kl": placement == "corrected"}


def _weight(translation: Translation) -> dict[str, Any]:
    """TRL's `loss_type` fixes weight and aggregation together."""
    objective = translation.objective
    ratio = translation.translate("ratio", {"token": "token", "sequence_mean": "sequence"}, "token")
    weight = "ppo_clip" if translation.on_policy else objective.weight  # on policy all weights are 1
    aggregation = translation.active_value("aggregation", "sequence_mean")
    found: dict[str, Any] = {"importance_sampling_level": ratio}
    if weight == "ppo_clip":
        types = {"sequence_mean": "grpo", "token_mean": "dapo", "constant": "dr_grpo"}
        if ratio == "sequence":
            types = {"sequence_mean": "grpo", "sequence_sum": "luspo"}
        found["loss_type"] = translation.translate("aggregation", types, "sequence_mean")
        if not translation.on_policy:
            found |= {"epsilon": objective.eps_low, "epsilon_high": objective.eps_high}
    elif weight == "truncate" and ratio == "token":
        if aggregation != "token_mean":
            raise translation.refusal("aggregation", "its CISPO has the token mean only")
        found |= {"loss_type": "cispo", "epsilon_high": objective.cap}
    elif weight == "sigmoid" and ratio == "token":
        if aggregation != "sequence_mean":
            raise translation.refusal("aggregation", "its SAPO has the mean over sequences only")
        found |= {
            "loss_type": "sapo",
            "sapo_temperature_pos": objective.tau_pos,
            "sapo_temperature_neg": objective.tau_neg,
        }
    else:
        raise translation.refusal("weight", "it has ppo_clip, truncate (CISPO) and sigmoid (SAPO, token ratio)")
    return found


def _advantage(translation: Translation) -> dict[str, Any]:
    names = {"group_norm": "group", "group_center": "none", "group_center_batch_norm": "batch"}
    scale = translation.translate("advantage", names, translation.objective.advantage)
    if scale != "none":
        translation.compare_std(1e-4)
    return {"scale_rewards": scale}
