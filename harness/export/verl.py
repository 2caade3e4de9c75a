"""A cell as overrides of verl's `ppo_trainer` configuration, verl 0.9.

The correspondence is that of verl's code, not of its documentation: comments say what decides it.
"""

from __future__ import annotations

from typing import Any

from klab.grid import Objective, UserError
from klab.grid.schema.sections import TrainingSection
from klab.harness.export.family import Condition, Family, find
from klab.harness.export.setting import (
    Export,
    Setting,
    overlong_differences,
    require_own_fresh_rollouts,
    sampler_differences,
)

ACTOR = "actor_rollout_ref.actor"
OUT_OF_REACH = 1e9
"""A bound that nothing reaches, where verl always has one."""

_TARGET = "overrides of verl.trainer.main_ppo"
AGGREGATIONS = {
    "sequence_mean": "seq-mean-token-mean",
    "token_mean": "token-mean",
    "constant": "seq-mean-token-sum-norm",
    "sequence_sum": "seq-mean-token-sum",
}
ESTIMATORS = {"k1": "k1", "k2": "k2", "k3": "k3", "abs": "abs", "k3_plus": "k3+"}
_ADVANTAGES = {
    "group_norm": "grpo",
    "group_center": "grpo",
    "leave_one_out": "rloo",
    "length_baseline": "opo",
    "greedy_baseline": "remax",
    "batch_norm": "reinforce_plus_plus",
    "gae": "gae",
    "group_center_rescaled": "gpg",
    "best_of_group": "grpo_passk",
}
_OF_TRAJECTORIES = (
    "group_norm",
    "group_center",
    "leave_one_out",
    "length_baseline",
    "group_center_rescaled",
    "best_of_group",
)
"""Advantages whose estimators sum a trajectory's rewards first, so that a KL in the reward reaches all its tokens."""
_OF_TOKENS = ("greedy_baseline", "batch_norm", "gae")
"""Advantages whose estimators sum the rewards from each token on."""
_LOSSES: dict[str, dict[str, tuple[str, ...]]] = {
    "vanilla": {"ratio": ("token",), "weight": ("ppo_clip", "dual_clip"), "path": ("score",)},
    "gspo": {"ratio": ("sequence_mean",), "weight": ("ppo_clip",), "path": ("score",)},
    "gspo, constant advantages": {"ratio": ("sequence_mean",), "weight": ("ppo_clip",), "path": ("ratio",)},
    "cispo": {"ratio": ("token",), "weight": ("clamp", "truncate"), "path": ("score",)},
    "sapo": {"ratio": ("token",), "weight": ("sigmoid",), "path": ("score",), "aggregation": ("sequence_mean",)},
    "dppo_tv": {"ratio": ("token",), "weight": ("dppo_tv",), "path": ("score",)},
    "dppo_kl": {"ratio": ("token",), "weight": ("dppo_kl",), "path": ("score",)},
    "geo_mean, constant advantages": {
        "ratio": ("clipped_mean",),
        "weight": ("ratio",),
        "path": ("ratio",),
        "aggregation": ("sequence_mean",),
    },
    "gpg": {"ratio": ("none",), "weight": ("one",), "path": ("score",)},
}
"""verl's `loss_mode` fixes ratio and weight. Its gspo has the score path, which is the ratio path wherever the
advantage is constant along a trajectory."""


def _settings(objective: Objective) -> dict[str, Any]:
    """Overrides of the algorithm."""
    return {
        f"{ACTOR}.loss_agg_mode": AGGREGATIONS[objective.aggregation],
        **_kl(objective),
        **_advantage(objective),
        **_weight(objective),
        **({f"{ACTOR}.entropy_coeff": objective.entropy_bonus} if objective.entropy_bonus else {}),
    }


def _kl(objective: Objective) -> dict[str, Any]:
    if objective.placement == "none":
        return {f"{ACTOR}.use_kl_loss": False, "algorithm.use_kl_in_reward": False}
    kind = ESTIMATORS[objective.estimator]
    if objective.placement == "loss":
        return {
            f"{ACTOR}.use_kl_loss": True,
            f"{ACTOR}.kl_loss_type": kind,
            f"{ACTOR}.kl_loss_coef": objective.beta,
            "algorithm.use_kl_in_reward": False,
        }
    return {
        f"{ACTOR}.use_kl_loss": False,
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_penalty": kind,
        "algorithm.kl_ctrl.kl_coef": objective.beta,
    }


def _advantage(objective: Objective) -> dict[str, Any]:
    name = _ADVANTAGES[objective.advantage]
    found: dict[str, Any] = {"algorithm.adv_estimator": name}
    if name in ("grpo", "grpo_passk"):
        found["algorithm.norm_adv_by_std_in_grpo"] = objective.advantage != "group_center"
    if name == "reinforce_plus_plus":
        found["algorithm.gamma"] = 1.0
    if name == "gae":
        found |= {"algorithm.gamma": objective.gamma, "algorithm.lam": objective.lam}
    return found


def _weight(objective: Objective) -> dict[str, Any]:
    mode, weight = f"{ACTOR}.policy_loss.loss_mode", objective.weight
    if weight == "one":
        return {mode: "gpg"}
    if weight in ("dppo_tv", "dppo_kl"):
        widths = (objective.tv_low, objective.tv_high) if weight == "dppo_tv" else (objective.kl_low, objective.kl_high)
        found = {"low": widths[0], "high": widths[1], "c": objective.truncation}
        return {mode: weight, **{f"{ACTOR}.clip_ratio_{end}": value for end, value in found.items()}}
    if objective.ratio == "clipped_mean":
        low, high = objective.clip_low, objective.clip_high
        return {mode: "geo_mean", f"{ACTOR}.clip_ratio_low": low, f"{ACTOR}.clip_ratio_high": high}
    if weight in ("ppo_clip", "dual_clip"):
        return {
            mode: "gspo" if objective.ratio == "sequence_mean" else "vanilla",
            # its vanilla loss clips twice: ppo_clip gets a c out of reach
            f"{ACTOR}.clip_ratio_c": objective.c if weight == "dual_clip" else OUT_OF_REACH,
            f"{ACTOR}.clip_ratio_low": objective.eps_low,
            f"{ACTOR}.clip_ratio_high": objective.eps_high,
        }
    if weight == "sigmoid":
        return {mode: "sapo", f"{ACTOR}.tau_pos": objective.tau_pos, f"{ACTOR}.tau_neg": objective.tau_neg}
    low, high = (objective.eps_low, objective.eps_high) if weight == "clamp" else (1.0, objective.cap - 1.0)
    return {mode: "cispo", f"{ACTOR}.clip_ratio_low": low, f"{ACTOR}.clip_ratio_high": high}


def _families() -> tuple[Family, ...]:
    found = []
    for mode, axes in _LOSSES.items():
        for advantages, charged in ((_OF_TRAJECTORIES, "reward"), (_OF_TOKENS, "reward_to_go")):
            if mode.endswith("constant advantages") and advantages is _OF_TOKENS:
                continue
            for advantage in advantages:
                shared = {"aggregation": tuple(AGGREGATIONS), **axes}
                found.append(
                    Family(
                        f"verl's {mode.partition(',')[0]} loss with {_ADVANTAGES[advantage]}",
                        _TARGET,
                        {
                            "estimator": tuple(ESTIMATORS),
                            "divergence": ("reverse",),
                            "placement": ("loss", charged, "none"),
                            "advantage": (advantage,),
                            **shared,
                        },
                        _settings,
                        fixed={"kl_scale": "sum", "kl_at": "rollout", "whiten": "batch"},
                        conventions=_CONVENTIONS.get(advantage, {}),
                        conditions=(_CLAMPED,),
                        terms=("entropy_bonus",),
                    )
                )
    return tuple(found)


_CONVENTIONS: dict[str, dict[str, Any]] = {
    "group_norm": {"std": "sample", "eps": 1e-6},
    "best_of_group": {"std": "sample", "eps": 1e-6},
    "batch_norm": {"std": "sample", "eps": 0.0},  # verl adds 1e-8 to the variance instead
}
_CLAMPED = Condition(
    "cap",
    lambda objective: objective.weight != "truncate" or objective.cap > 1.0,
    "its upper clipping width, cap − 1, must be positive",
)
FAMILIES = _families()
"""What verl trains; the gradients of all its points are compared in `tests/parity`."""


def verl_overrides(setting: Setting) -> Export:
    """Overrides of verl's `ppo_trainer` configuration, dotted.

    Raises:
        UserError: naming the axis or setting that verl cannot express, and why.
    """
    family, objective, differences = find(FAMILIES, setting, "verl")
    found = family.settings(objective)
    if objective.placement != "none" and objective.estimator in ("k3", "k3_plus"):
        differences.append("verl's k3 is clamped at 10: where π_ref/π is above 13 its value stops and has no gradient")
    if objective.ratio == "clipped_mean":
        differences.append("verl averages geo_mean over each micro-batch: let one be a mini-batch")
    if objective.aggregation == "constant":
        if setting.max_new_tokens:
            found[f"{ACTOR}.loss_scale_factor"] = setting.max_new_tokens
        else:
            differences.append(f"set {ACTOR}.loss_scale_factor to max_response_length: verl's default varies")
    training = setting.training
    if training is not None:
        require_own_fresh_rollouts(training, "verl")
        chosen, more = training_overrides(training, objective)
        found |= chosen
        differences += more
    elif objective.advantage == "gae":
        differences.append("set the critic's learning rate and cliprange_value")
    if setting.max_new_tokens:
        found["data.max_response_length"] = setting.max_new_tokens
    return Export(found, tuple(differences), family.target, objective)


def training_overrides(training: TrainingSection, objective: Objective) -> tuple[dict[str, Any], list[str]]:
    """Overrides of the schedule, the rollouts and the optimizers, and what they leave different.

    Raises:
        UserError: groups that leave the update without being replaced, truncated trajectories that do, a β that
            changes, a learning rate that falls linearly.
    """
    for name, plain, why in (
        ("equal_groups", ("keep", "refill"), "what it filters, it draws again"),
        ("truncated", ("keep",), "it trains on truncated samples"),
        (
            "beta_control",
            (None,),
            "the KL that its adaptive coefficient follows is another one, and it has no schedule",
        ),
        ("reference", (None,), "its reference policy stays where it is"),
        ("entropy_control", (None,), "the coefficient of its entropy bonus is constant"),
        ("schedule", ("constant", "cosine"), "its learning rate is constant or falls as a cosine"),
    ):
        if getattr(training, name) not in plain:
            raise UserError(f"verl cannot express this cell: {why}", key=f"training.{name}")
    optim = f"{ACTOR}.optim"
    found: dict[str, Any] = {
        "data.train_batch_size": training.prompts,
        f"{ACTOR}.ppo_mini_batch_size": training.prompts // training.minibatches,
        f"{ACTOR}.ppo_epochs": training.updates_per_rollout,
        f"{ACTOR}.grad_clip": OUT_OF_REACH if training.clip_norm is None else training.clip_norm,
        f"{optim}.lr": training.lr,
        f"{optim}.lr_scheduler_type": training.schedule,
        f"{optim}.weight_decay": training.weight_decay,
        f"{optim}.betas": [training.adam_beta1, training.adam_beta2],
        f"{optim}.lr_warmup_steps": training.warmup_updates,
        "actor_rollout_ref.rollout.n": training.group_size,
        "actor_rollout_ref.rollout.temperature": training.temperature,
        "actor_rollout_ref.rollout.top_p": training.top_p,
        "trainer.total_training_steps": -(-training.updates // training.optimizer_steps_per_rollout),
    }
    if training.adam_eps != 1e-8:
        found[f"{optim}.override_optimizer_config"] = {"eps": training.adam_eps}
    differences = overlong_differences(training, "the reward manager 'dapo' and its overlong_buffer")
    if training.equal_groups == "refill":
        found |= {
            "algorithm.filter_groups.enable": True,
            "algorithm.filter_groups.metric": "seq_reward",
            "algorithm.filter_groups.max_num_gen_batches": training.refill_rounds + 1,
        }
        differences.append("only its DAPO recipe filters groups; it stops where klab fills up with equal groups")
    return (
        found | _critic(training, objective) | _sampler(training, objective),
        differences + sampler_differences(training, "verl"),
    )


def _critic(training: TrainingSection, objective: Objective) -> dict[str, Any]:
    """Overrides of the critic.

    Raises:
        UserError: a critic of another kind than verl's, or none where it has one.
    """
    critic = training.critic
    if objective.advantage != "gae":
        return {}
    if critic is None or critic.kind != "model":
        raise UserError(
            "verl cannot express this cell: its values come from a model of their own",
            key="training.critic",
            value=None if critic is None else critic.kind,
        )
    return {
        "critic.optim.lr": training.lr if critic.lr is None else critic.lr,
        "critic.cliprange_value": OUT_OF_REACH if critic.clip is None else critic.clip,
        "trainer.critic_warmup": -(-critic.warmup_updates // training.optimizer_steps_per_rollout),
    }


def _sampler(training: TrainingSection, objective: Objective) -> dict[str, Any]:
    """Overrides of the rollout correction.

    Raises:
        UserError: a correction that verl lacks, or one that does more there.
    """
    sampler = training.sampler
    if sampler is None:
        return {}

    def refusal(name: str, why: str) -> UserError:
        return UserError(f"verl cannot express this cell: {why}", key=f"training.sampler.{name}")

    corrected = "algorithm.rollout_correction"
    found: dict[str, Any] = {}
    if sampler.correction == "ratio":
        raise refusal("correction", "with the sampler as π_old its other losses are not used")
    if sampler.correction == "tis":
        if sampler.floor:
            raise refusal("floor", "its truncation has an upper bound only")
        found[f"{corrected}.rollout_is_threshold"] = sampler.cap
    if sampler.correction == "icepop":
        if not sampler.low:
            raise refusal("low", "its lower bound is positive")
        found[f"{corrected}.rollout_is_threshold"] = f"{sampler.low!r}_{sampler.high!r}"
    if found:
        found[f"{corrected}.rollout_is"] = sampler.level
    reject = sampler.reject
    if reject is not None:
        # what it rejects leaves its response mask, and so the KL, the statistics over tokens and their number
        plain = objective.placement == "none" and objective.aggregation != "token_mean"
        if (
            reject.over == "token"
            or not plain
            or objective.advantage not in ("group_norm", "group_center", "leave_one_out")
        ):
            raise refusal("reject", "what it rejects leaves the KL term and the denominators too")
        found[f"{corrected}.rollout_rs"] = f"seq_{reject.over}_{reject.divergence}"
        bounds = f"{1.0 / reject.high!r}_{1.0 / reject.lower_bound!r}" if reject.divergence == "k1" else reject.high
        found[f"{corrected}.rollout_rs_threshold"] = bounds
    return found | ({"actor_rollout_ref.rollout.calculate_log_probs": True} if found else {})
