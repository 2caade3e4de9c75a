"""A cell in the words of TRL 1.16 or verl 0.9, where they have words for it.

The correspondence is that of the libraries' own code, not of their documentation: see the comments for what decides it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from klab.grid import Objective, UserError
from klab.grid.schema.sections import TrainingSection
from klab.harness.export.peer_training import require_own_fresh_rollouts, trl_selection, verl_selection


@dataclass(frozen=True, slots=True)
class Setting:
    """What is exported: an objective, under a training schedule unless it is an algorithm without one."""

    objective: Objective
    training: TrainingSection | None = None

    @property
    def on_policy(self) -> bool:
        return self.training is not None and self.training.on_policy

    @property
    def max_new_tokens(self) -> int | None:
        return self.training.max_new_tokens if self.training is not None else None


@dataclass(frozen=True, slots=True)
class Export:
    """A peer's settings, and in words what they leave different."""

    settings: dict[str, Any]
    differences: tuple[str, ...] = ()


class _Active:
    """The active axes and parameters of an objective; inactive ones read as what the peer has anyway."""

    def __init__(self, setting: Setting, peer: str) -> None:
        self.peer = peer
        self.objective = setting.objective
        self.on_policy = setting.on_policy
        self.canonical = setting.objective.canonical(setting.on_policy)
        self.differences: list[str] = []

    def axis(self, name: str, otherwise: str) -> str:
        return str(self.canonical.get(name, otherwise))

    def refuse(self, axis: str, why: str) -> UserError:
        return UserError(
            f"{self.peer} cannot express this cell: {why}", key=axis, value=getattr(self.objective, axis, None)
        )

    def translate(self, axis: str, words: dict[str, str], otherwise: str) -> str:
        """The peer's word for the chosen value."""
        value = self.axis(axis, otherwise)
        if value not in words:
            raise self.refuse(axis, f"it has only {', '.join(words)} on this axis")
        return words[value]


def trl(setting: Setting) -> Export:
    """Arguments of `trl.GRPOConfig`.

    Raises:
        UserError: naming the axis that TRL cannot express, and why.
    """
    active = _Active(setting, "TRL")
    found: dict[str, Any] = {**_trl_kl(active), **_trl_weight(active), **_trl_advantage(active)}
    training = setting.training
    if training is not None:
        require_own_fresh_rollouts(training, "TRL")
        chosen, differences = trl_selection(training)
        active.differences += differences
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
    return Export(found, tuple(active.differences))


def verl(setting: Setting) -> Export:
    """Overrides of verl's `ppo_trainer` configuration, dotted.

    Raises:
        UserError: naming the axis that verl cannot express, and why.
    """
    active = _Active(setting, "verl")
    actor = "actor_rollout_ref.actor"
    found: dict[str, Any] = {**_verl_kl(active), **_verl_weight(active), **_verl_advantage(active)}
    modes = {
        "sequence_mean": "seq-mean-token-mean",
        "token_mean": "token-mean",
        "constant": "seq-mean-token-sum-norm",
        "sequence_sum": "seq-mean-token-sum",
    }
    found[f"{actor}.loss_agg_mode"] = active.translate("aggregation", modes, "sequence_mean")
    if active.axis("aggregation", "sequence_mean") == "constant":
        if setting.max_new_tokens:
            found[f"{actor}.loss_scale_factor"] = setting.max_new_tokens
        else:
            active.differences.append(f"set {actor}.loss_scale_factor to max_response_length: verl's default varies")
    training = setting.training
    if training is not None:
        require_own_fresh_rollouts(training, "verl")
        chosen, differences = verl_selection(training)
        active.differences += differences
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
    return Export(found, tuple(active.differences))


PEERS: dict[str, Callable[[Setting], Export]] = {"trl": trl, "verl": verl}


def _trl_kl(active: _Active) -> dict[str, Any]:
    placement = active.translate(
        "placement", {"none": "", "loss": "loss", "loss_corrected": "corrected"}, active.objective.placement
    )
    if not placement:
        return {"beta": 0.0}
    if active.axis("estimator", "k3") != "k3":
        raise active.refuse("estimator", "GRPOTrainer's KL is always k3")
    if placement == "corrected" and active.axis("ratio", "token") != "token":
        raise active.refuse("ratio", "its corrected KL is multiplied by the token ratio")
    return {"beta": active.objective.beta, "use_bias_correction_kl": placement == "corrected"}


def _trl_weight(active: _Active) -> dict[str, Any]:
    """TRL's `loss_type` fixes weight and aggregation together."""
    objective = active.objective
    ratio = active.translate("ratio", {"token": "token", "sequence_mean": "sequence"}, "token")
    weight = "ppo_clip" if active.on_policy else objective.weight  # on policy all weights are 1
    aggregation = active.axis("aggregation", "sequence_mean")
    found: dict[str, Any] = {"importance_sampling_level": ratio}
    if weight == "ppo_clip":
        types = {"sequence_mean": "grpo", "token_mean": "dapo", "constant": "dr_grpo"}
        if ratio == "sequence":
            types = {"sequence_mean": "grpo", "sequence_sum": "luspo"}
        found["loss_type"] = active.translate("aggregation", types, "sequence_mean")
        if not active.on_policy:
            found |= {"epsilon": objective.eps_low, "epsilon_high": objective.eps_high}
    elif weight == "truncate" and ratio == "token":
        if aggregation != "token_mean":
            raise active.refuse("aggregation", "its CISPO has the token mean only")
        found |= {"loss_type": "cispo", "epsilon_high": objective.cap}
    elif weight == "sigmoid" and ratio == "token":
        if aggregation != "sequence_mean":
            raise active.refuse("aggregation", "its SAPO has the mean over sequences only")
        found |= {
            "loss_type": "sapo",
            "sapo_temperature_pos": objective.tau_pos,
            "sapo_temperature_neg": objective.tau_neg,
        }
    else:
        raise active.refuse("weight", "it has ppo_clip, truncate (CISPO) and sigmoid (SAPO, token ratio)")
    return found


def _trl_advantage(active: _Active) -> dict[str, Any]:
    words = {"group_norm": "group", "group_center": "none", "group_center_batch_norm": "batch"}
    scale = active.translate("advantage", words, active.objective.advantage)
    if scale != "none":
        _compare_std(active, 1e-4)
    return {"scale_rewards": scale}


def _verl_kl(active: _Active) -> dict[str, Any]:
    placement = active.translate(
        "placement", {"none": "", "loss": "loss", "reward": "reward"}, active.objective.placement
    )
    actor = "actor_rollout_ref.actor"
    if not placement:
        return {f"{actor}.use_kl_loss": False, "algorithm.use_kl_in_reward": False}
    kinds = {"k1": "k1", "k2": "k2", "k3": "k3", "abs": "abs", "k3_plus": "k3+"}
    kind = active.translate("estimator", kinds, active.objective.estimator)
    if placement == "loss":
        return {
            f"{actor}.use_kl_loss": True,
            f"{actor}.kl_loss_type": kind,
            f"{actor}.kl_loss_coef": active.objective.beta,
            "algorithm.use_kl_in_reward": False,
        }
    if active.objective.kl_scale != "sum":
        raise UserError("verl cannot express this cell: it sums a KL in the reward", key="kl_scale", value="mean")
    if active.canonical.get("placement.kl_at", "rollout") != "rollout":
        raise UserError("verl cannot express this cell: it takes the KL at the rollout", key="kl_at", value="current")
    return {
        f"{actor}.use_kl_loss": False,
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_penalty": kind,
        "algorithm.kl_ctrl.kl_coef": active.objective.beta,
    }


def _verl_weight(active: _Active) -> dict[str, Any]:
    """verl's `loss_mode` fixes ratio and weight; its vanilla clips twice, so ppo_clip gets a c out of reach."""
    objective = active.objective
    actor = "actor_rollout_ref.actor"
    mode = f"{actor}.policy_loss.loss_mode"
    ratio = active.translate("ratio", {"token": "token", "sequence_mean": "sequence"}, "token")
    weight = "ppo_clip" if active.on_policy else objective.weight  # on policy all weights are 1
    if ratio == "sequence" and weight != "ppo_clip":
        raise active.refuse("weight", "a sequence ratio comes with ppo_clip (GSPO) only")
    if weight in ("ppo_clip", "dual_clip"):
        found: dict[str, Any] = {mode: "gspo" if ratio == "sequence" else "vanilla"}
        found[f"{actor}.clip_ratio_c"] = objective.c if weight == "dual_clip" else 1e9
        if not active.on_policy:
            found |= {f"{actor}.clip_ratio_low": objective.eps_low, f"{actor}.clip_ratio_high": objective.eps_high}
        return found
    if weight == "clamp":
        low, high = objective.eps_low, objective.eps_high
        return {mode: "cispo", f"{actor}.clip_ratio_low": low, f"{actor}.clip_ratio_high": high}
    if weight == "truncate":
        return {mode: "cispo", f"{actor}.clip_ratio_low": 1.0, f"{actor}.clip_ratio_high": objective.cap - 1.0}
    if weight == "sigmoid":
        if active.axis("aggregation", "") != "sequence_mean":
            raise active.refuse("aggregation", "its SAPO has the mean over sequences only")
        return {mode: "sapo", f"{actor}.tau_pos": objective.tau_pos, f"{actor}.tau_neg": objective.tau_neg}
    raise active.refuse("weight", "it has ppo_clip, dual_clip, clamp and truncate (CISPO), and sigmoid (SAPO)")


def _verl_advantage(active: _Active) -> dict[str, Any]:
    words = {
        "group_norm": "grpo",
        "group_center": "grpo",
        "leave_one_out": "rloo",
        "greedy_baseline": "remax",
        "length_baseline": "opo",
    }
    name = active.translate("advantage", words, active.objective.advantage)
    found: dict[str, Any] = {"algorithm.adv_estimator": name}
    if name == "grpo":
        found["algorithm.norm_adv_by_std_in_grpo"] = active.objective.advantage == "group_norm"
        if active.objective.advantage == "group_norm":
            _compare_std(active, 1e-6)
    return found


def _compare_std(active: _Active, eps: float) -> None:
    std, own = active.objective.std, active.objective.eps
    if std != "sample":
        active.differences.append(
            f"{active.peer} divides advantages by the sample standard deviation, this cell by the population's: "
            "a factor √((G − 1)/G); std: sample makes them equal"
        )
    if own != eps:
        active.differences.append(f"{active.peer} adds {eps:g} to the standard deviation, this cell {own:g}")
