"""A cell as arguments of `trl.GRPOConfig` or `trl.RLOOConfig`, TRL 1.16.

The correspondence is that of TRL's code, not of its documentation: comments say what decides it.
"""

from __future__ import annotations

from typing import Any

from klab.grid import Objective, UserError
from klab.grid.schema.sections import ReferencePolicy, TrainingSection
from klab.harness.export.family import Condition, Family, find
from klab.harness.export.setting import (
    Export,
    Setting,
    overlong_differences,
    require_own_fresh_rollouts,
    sampler_differences,
)

GRPO, RLOO = "arguments of trl.GRPOConfig", "arguments of trl.RLOOConfig"

_CLIPPED = {"sequence_mean": "grpo", "token_mean": "dapo", "constant": "dr_grpo", "sequence_sum": "luspo"}
_SCALES = {"group_norm": "group", "group_center": "none", "group_center_batch_norm": "batch"}
_SHARED: dict[str, tuple[str, ...]] = {
    "estimator": ("k3",),
    "divergence": ("reverse",),
    "placement": ("loss", "loss_corrected", "none"),
    "advantage": tuple(_SCALES),
    "path": ("score", "ratio"),  # equal: the advantage is constant along a trajectory
}
_STD = {"std": "sample", "eps": 1e-4}


def _grpo(objective: Objective) -> dict[str, Any]:
    """What does not depend on the loss type: KL and advantage."""
    kl: dict[str, Any] = {"beta": 0.0}
    if objective.placement != "none":
        kl = {"beta": objective.beta, "use_bias_correction_kl": objective.placement == "loss_corrected"}
    level = "sequence" if objective.ratio == "sequence_mean" else "token"
    entropy: dict[str, Any] = {}
    if objective.entropy_share < 1.0:
        entropy = {"top_entropy_quantile": objective.entropy_share}
    if objective.entropy_bonus:
        entropy = {"entropy_coef": objective.entropy_bonus}
    return {**kl, **entropy, "scale_rewards": _SCALES[objective.advantage], "importance_sampling_level": level}


_TERMS = ("entropy_bonus", "entropy_share")
_ENTROPY = (
    # its bonus is a mean over tokens whatever its loss is, and over those of high entropy where there is a mask
    Condition(
        "entropy_bonus",
        lambda objective: not objective.entropy_bonus or objective.aggregation == "token_mean",
        "its entropy bonus is a mean over tokens",
    ),
    Condition(
        "entropy_bonus",
        lambda objective: not objective.entropy_bonus or objective.entropy_share == 1.0,
        "its entropy bonus leaves out the tokens that the share leaves out",
    ),
)


def _clipped(objective: Objective) -> dict[str, Any]:
    widths = {"epsilon": objective.eps_low, "epsilon_high": objective.eps_high}
    more: dict[str, Any] = {}
    if objective.weight in ("dual_clip", "two_sided_clip"):
        more = {"delta": objective.c if objective.weight == "dual_clip" else objective.ceiling}
    elif objective.weight == "sequence_kl_mask":
        more = {"off_policy_mask_threshold": objective.drift}
    return {**_grpo(objective), "loss_type": _CLIPPED[objective.aggregation], **widths, **more}


def _cispo(objective: Objective) -> dict[str, Any]:
    return {**_grpo(objective), "loss_type": "cispo", "epsilon_high": objective.cap}


def _sapo(objective: Objective) -> dict[str, Any]:
    temperatures = {"sapo_temperature_pos": objective.tau_pos, "sapo_temperature_neg": objective.tau_neg}
    return {**_grpo(objective), "loss_type": "sapo", **temperatures}


def _vespo(objective: Objective) -> dict[str, Any]:
    kernel = {
        f"vespo_{theirs}_{sign}": getattr(objective, f"{ours}_{sign}")
        for ours, theirs in (("k", "k"), ("rate", "lambda"))
        for sign in ("pos", "neg")
    }
    return {**_grpo(objective), "loss_type": "vespo", **kernel}


def _rloo(objective: Objective) -> dict[str, Any]:
    beta = 0.0 if objective.placement == "none" else objective.beta
    return {"beta": beta, "epsilon": objective.eps_low, "epsilon_high": objective.eps_high}


FAMILIES = (
    Family(
        "GRPOTrainer",
        GRPO,
        {
            **_SHARED,
            "ratio": ("token", "sequence_mean"),
            "weight": ("ppo_clip", "dual_clip", "two_sided_clip", "sequence_kl_mask"),
            "aggregation": tuple(_CLIPPED),
        },
        _clipped,
        conventions=_STD,
        # `delta` caps the ratio before the minimum, for both signs of A: where A > 0 only the clip may act
        conditions=(
            Condition(
                "c",
                lambda objective: objective.weight != "dual_clip" or objective.c >= 1.0 + objective.eps_high,
                "its delta caps ratios of positive advantages too, and must not be below 1 + eps_high",
            ),
            *_ENTROPY,
        ),
        terms=_TERMS,
    ),
    Family(
        "GRPOTrainer's CISPO",
        GRPO,
        {
            **_SHARED,
            "path": ("score",),
            "ratio": ("token", "sequence_mean"),
            "weight": ("truncate",),
            "aggregation": ("token_mean",),
        },
        _cispo,
        conventions=_STD,
        conditions=_ENTROPY,
        terms=_TERMS,
    ),
    Family(
        "GRPOTrainer's SAPO",
        GRPO,
        {**_SHARED, "ratio": ("token",), "weight": ("sigmoid",), "aggregation": ("sequence_mean",)},
        _sapo,
        conventions=_STD,
        conditions=_ENTROPY,
        terms=_TERMS,
    ),
    Family(
        "GRPOTrainer's VESPO",
        GRPO,
        {
            **_SHARED,
            "placement": ("loss", "none"),  # its corrected KL is multiplied by the token ratio
            "path": ("score",),
            "ratio": ("sequence_product",),
            "weight": ("gamma_kernel",),
            "aggregation": ("token_mean",),
        },
        _vespo,
        conventions=_STD,
        conditions=_ENTROPY,
        terms=_TERMS,
    ),
    Family(
        "RLOOTrainer",
        RLOO,
        {
            "estimator": ("k1",),
            "divergence": ("reverse",),
            "placement": ("reward", "none"),
            "ratio": ("sequence_product",),
            "weight": ("ppo_clip",),
            "advantage": ("leave_one_out",),
            "aggregation": ("sequence_sum",),
            "path": ("score",),
        },
        _rloo,
        fixed={"kl_scale": "sum", "kl_at": "rollout"},
    ),
)
"""What TRL trains; the gradients of all its points are compared in `tests/parity`."""


def trl_arguments(setting: Setting) -> Export:
    """Arguments of TRL's configuration.

    Raises:
        UserError: naming the axis or setting that TRL cannot express, and why.
    """
    family, objective, differences = find(FAMILIES, setting, "TRL")
    found = family.settings(objective)
    training = setting.training
    if training is not None:
        require_own_fresh_rollouts(training, "TRL")
        found |= _entropy_control(training, objective, family.target)
        chosen, more = _training(training, family.target, str(found.get("loss_type")))
        found |= chosen
        differences += more
    if setting.max_new_tokens:
        found["max_completion_length"] = setting.max_new_tokens
    if family.target == RLOO:
        differences.append("RLOOTrainer has no mask of environment tokens: tasks of one turn only")
    return Export(found, tuple(differences), family.target, objective)


def _entropy_control(training: TrainingSection, objective: Objective, target: str) -> dict[str, Any]:
    """Arguments of an adaptive entropy bonus.

    Raises:
        UserError: the trainer has none, or a bonus that is another mean than the cell's.
    """
    control = training.entropy_control
    if control is None:
        return {}
    if target == RLOO or objective.aggregation != "token_mean" or objective.entropy_share < 1.0:
        why = "RLOOTrainer has none" if target == RLOO else "its entropy bonus is a mean over all tokens of its loss"
        raise UserError(f"TRL cannot express this cell: {why}", key="training.entropy_control")
    return {
        "use_adaptive_entropy": True,
        "entropy_coef": objective.entropy_bonus,
        "entropy_target": control.target,
        "entropy_coef_delta": control.step,
        "entropy_coef_min": control.low,
        "entropy_coef_max": control.high,
    }


def _training(training: TrainingSection, target: str, loss_type: str) -> tuple[dict[str, Any], list[str]]:
    """Arguments of the schedule, the rollouts and the optimizer, and what they leave different.

    Raises:
        UserError: groups that leave the update or are replaced, a β that changes, a critic.
    """
    for name, plain, why in (
        ("equal_groups", "keep", "it trains on every group"),
        ("critic", None, "it has no critic"),
        ("beta_control", None, "its beta is constant"),
    ):
        if getattr(training, name) != plain:
            raise UserError(f"TRL cannot express this cell: {why}", key=f"training.{name}")
    found: dict[str, Any] = {
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
    if training.truncated == "mask":
        found["mask_truncated_completions"] = True
    if training.reference is not None:
        found |= _moving_reference(training.reference)
    differences = overlong_differences(training, "trl.rewards.get_soft_overlong_punishment")
    return found | _sampler(training, target, loss_type), differences + sampler_differences(training, "TRL")


def _moving_reference(reference: ReferencePolicy) -> dict[str, Any]:
    """Arguments of a reference model that TRL moves as klab does, after the same updates.

    Raises:
        UserError: it is the policy that drew the rollout, which TRL does not keep.
    """
    if reference.follows == "rollout":
        raise UserError(
            "TRL cannot express this cell: its reference is a model of its own, not the policy that drew the rollout",
            key="training.reference",
            value="rollout",
        )
    return {
        "sync_ref_model": True,
        "ref_model_mixup_alpha": 1.0 - reference.ema,
        "ref_model_sync_steps": reference.update_every,
    }


def _sampler(training: TrainingSection, target: str, loss_type: str) -> dict[str, Any]:
    """Arguments of vLLM as the sampler, and of the correction for it.

    Raises:
        UserError: another correction than TRL's four.
    """
    sampler = training.sampler
    if sampler is None:
        return {}
    if target == RLOO:
        raise UserError("TRL cannot express this cell: RLOOTrainer corrects nothing", key="training.sampler")
    if sampler.correction != "none" and loss_type == "vespo":
        raise UserError(
            "TRL cannot express this cell: its VESPO takes the correction into the kernel",
            key="training.sampler.correction",
            value=sampler.correction,
        )
    if sampler.correction == "ratio" or sampler.reject is not None:
        key = "reject" if sampler.reject is not None else "correction"
        raise UserError(
            "TRL cannot express this cell: it truncates or masks the ratio to the sampler",
            key=f"training.sampler.{key}",
        )
    found: dict[str, Any] = {"use_vllm": True, "vllm_importance_sampling_correction": sampler.correction != "none"}
    if sampler.correction == "none":
        return found
    truncates = sampler.correction == "tis"
    low, high = (sampler.floor, sampler.cap) if truncates else (sampler.low, sampler.high)
    return {
        **found,
        "vllm_importance_sampling_mode": f"{sampler.level}_{'truncate' if truncates else 'mask'}",
        "vllm_importance_sampling_clip_min": low or None,
        "vllm_importance_sampling_clip_max": high,
    }
