"""A cell as overrides of verl's `ppo_trainer` configuration, verl 0.9.

The correspondence is that of verl's code, not of its documentation: comments say what decides it.
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


def verl(setting: Setting) -> Export:
    """Overrides of verl's `ppo_trainer` configuration, dotted.

    Raises:
        UserError: naming the axis that verl cannot express, and why.
    """
    translation = Translation(setting, "verl")
    actor = "actor_rollout_ref.actor"
    found: dict[str, Any] = {**_kl(translation), **_weight(translation), **_advantage(translation)}
    modes = {
        "sequence_mean": "seq-mean-token-mean",
        "token_mean": "token-mean",
        "constant": "seq-mean-token-sum-norm",
        "sequence_sum": "seq-mean-token-sum",
    }
    found[f"{actor}.loss_agg_mode"] = translation.translate("aggregation", modes, "sequence_mean")
    if translation.active_value("aggregation", "sequence_mean") == "constant":
        if setting.max_new_tokens:
            found[f"{actor}.loss_scale_factor"] = setting.max_new_tokens
        else:
            translation.differences.append(
                f"set {actor}.loss_scale_factor to max_response_length: verl's default varies"
            )
    training = setting.training
    if training is not None:
        require_own_fresh_rollouts(training, "verl")
        chosen, differences = _selection(training)
        translation.differences += differences
        found |= {
            **chosen,
            "data.train_batch_size": training.prompts,
            f"{actor}.ppo_mini_batch_size": training.prompts // training.minibatches,
            f"{actor}.ppo_epochs": training.updates_per_rollout,
            f"{actor}.optim.lr": training.lr,
            f"{actor}.optim.weight_decay": training.weight_decay,
            f"{actor}.optim.lr_warmup_steps": training.warmup_updates,
            "actor_rollout_ref.rollout.n": training.group_size,
            "actor_rollout_ref.rollout.temperature": training.temperature,
            "actor_rollout_ref.rollout.top_p": training.top_p,
            "trainer.total_training_steps": -(-training.updates // training.optimizer_steps_per_rollout),
        }
        if training.clip_norm is not None:
            found[f"{actor}.grad_clip"] = training.clip_norm
    if setting.max_new_tokens:
        found["data.max_response_length"] = setting.max_new_tokens
    return Export(found, tuple(translation.differences))


def _selection(training: TrainingSection) -> tuple[dict[str, Any], list[str]]:
    """Overrides of verl's configuration, and what they leave different.

    Raises:
        UserError: groups that leave the update without being replaced, or truncated trajectories that do.
    """
    if training.equal_groups == "drop":
        raise UserError("verl cannot express this cell: what it filters, it draws again", key="training.equal_groups")
    if training.truncated == "mask":
        raise UserError("verl cannot express this cell: it trains on truncated samples", key="training.truncated")
    found: dict[str, Any] = {}
    differences = overlong_differences(training, "the reward manager 'dapo' and its overlong_buffer")
    if training.equal_groups == "refill":
        found = {
            "algorithm.filter_groups.enable": True,
            "algorithm.filter_groups.metric": "seq_reward",
            "algorithm.filter_groups.max_num_gen_batches": training.refill_rounds + 1,
        }
        differences.append("only its DAPO recipe filters groups; it stops where klab fills up with equal groups")
    return found, differences


def _kl(translation: Translation) -> dict[str, Any]:
    placement = translation.translate(
        "placement", {"none": "", "loss": "loss", "reward": "reward"}, translation.objective.placement
    )
    actor = "actor_rollout_ref.actor"
    if not placement:
        return {f"{actor}.use_kl_loss": False, "algorithm.use_kl_in_reward": False}
    kinds = {"k1": "k1", "k2": "k2", "k3": "k3", "abs": "abs", "k3_plus": "k3+"}
    kind = translation.translate("estimator", kinds, translation.objective.estimator)
    if placement == "loss":
        return {
            f"{actor}.use_kl_loss": True,
            f"{actor}.kl_loss_type": kind,
            f"{actor}.kl_loss_coef": translation.objective.beta,
            "algorithm.use_kl_in_reward": False,
        }
    if translation.objective.kl_scale != "sum":
        raise UserError("verl cannot express this cell: it sums a KL in the reward", key="kl_scale", value="mean")
    if translation.canonical.get("placement.kl_at", "rollout") != "rollout":
        raise UserError("verl cannot express this cell: it takes the KL at the rollout", key="kl_at", value="current")
    return {
        f"{actor}.use_kl_loss": False,
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_penalty": kind,
        "algorithm.kl_ctrl.kl_coef": translation.objective.beta,
    }


def _weight(translation: Translation) -> dict[str, Any]:
    """verl's `loss_mode` fixes ratio and weight; its vanilla clips twice, so ppo_clip gets a c out of reach."""
    objective = translation.objective
    actor = "actor_rollout_ref.actor"
    mode = f"{actor}.policy_loss.loss_mode"
    ratio = translation.translate("ratio", {"token": "token", "sequence_mean": "sequence"}, "token")
    weight = "ppo_clip" if translation.on_policy else objective.weight  # on policy all weights are 1
    if ratio == "sequence" and weight != "ppo_clip":
        raise translation.refusal("weight", "a sequence ratio comes with ppo_clip (GSPO) only")
    if weight in ("ppo_clip", "dual_clip"):
        found: dict[str, Any] = {mode: "gspo" if ratio == "sequence" else "vanilla"}
        found[f"{actor}.clip_ratio_c"] = objective.c if weight == "dual_clip" else 1e9
        if not translation.on_policy:
            found |= {f"{actor}.clip_ratio_low": objective.eps_low, f"{actor}.clip_ratio_high": objective.eps_high}
        return found
    if weight == "clamp":
        low, high = objective.eps_low, objective.eps_high
        return {mode: "cispo", f"{actor}.clip_ratio_low": low, f"{actor}.clip_ratio_high": high}
    if weight == "truncate":
        return {mode: "cispo", f"{actor}.clip_ratio_low": 1.0, f"{actor}.clip_ratio_high": objective.cap - 1.0}
    if weight == "sigmoid":
        if translation.active_value("aggregation", "") != "sequence_mean":
            raise translation.refusal("aggregation", "its SAPO has the mean over sequences only")
        return {mode: "sapo", f"{actor}.tau_pos": objective.tau_pos, f"{actor}.tau_neg": objective.tau_neg}
    raise translation.refusal("weight", "it has ppo_clip, dual_clip, clamp and truncate (CISPO), and sigmoid (SAPO)")


def _advantage(translation: Translation) -> dict[str, Any]:
    names = {
        "group_norm": "grpo",
        "group_center": "grpo",
        "leave_one_out": "rloo",
        "greedy_baseline": "remax",
        "length_baseline": "opo",
    }
    name = translation.translate("advantage", names, translation.objective.advantage)
    found: dict[str, Any] = {"algorithm.adv_estimator": name}
    if name == "grpo":
        found["algorithm.norm_adv_by_std_in_grpo"] = translation.objective.advantage == "group_norm"
        if translation.objective.advantage == "group_norm":
            translation.compare_std(1e-6)
    return found
