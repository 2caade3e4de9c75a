"""What `training.engine: trl` can train: which settings it refuses, which of TRL's fields klab sets, and what differs.

`trl.GRPOTrainer` generates, accumulates gradients and steps; klab's objective is its loss. Nothing of a cell may be
ignored: a setting that TRL has no place for is refused here by name, when the grid file is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from klab.grid.catalogue import value_of
from klab.grid.errors import UserError
from klab.grid.kl_settings import compares_distributions, idle_kl_settings, keeps_copy
from klab.grid.objective import Objective
from klab.grid.schema.policy import PolicySection
from klab.grid.schema.training import TrainingSection
from klab.grid.user_code import names_user_code

_OBJECTIVE = "the objective"
_MICRO = "training.micro_batch"
_UPDATES = "training.updates"
_SAMPLER = "training.sampler"
_CHECKPOINT = "training.checkpoint_updates and training.checkpoint_seconds"
_EVALUATION = "training.evaluate_every, evaluation_prompts and evaluation_samples"
_RECORD = "klab's own records, and `track`"
_FIXED = "nothing: klab's data and records depend on it"
_NO_TERM = "nothing: klab's objective has no such term"

SET_BY_KLAB: dict[str, str] = {
    "learning_rate": "training.lr",
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs"), "training.schedule"),
    **dict.fromkeys(("warmup_steps", "warmup_ratio"), "training.warmup_updates"),
    "weight_decay": "training.weight_decay",
    "adam_beta1": "training.adam_beta1",
    "adam_beta2": "training.adam_beta2",
    "adam_epsilon": "training.adam_eps",
    "max_grad_norm": "training.clip_norm",
    **dict.fromkeys(("max_steps", "num_train_epochs"), _UPDATES),
    "num_generations": "training.group_size",
    **dict.fromkeys(("generation_batch_size", "steps_per_generation"), "training.prompts and training.minibatches"),
    "num_iterations": "training.updates_per_rollout",
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"), _MICRO),
    "temperature": "training.temperature",
    "top_p": "training.top_p",
    "max_completion_length": "training.max_new_tokens",
    "mask_truncated_completions": "training.truncated",
    **dict.fromkeys(("seed", "data_seed"), "seeds"),
    **dict.fromkeys(("use_vllm", "vllm_importance_sampling_correction"), _SAMPLER),
    **dict.fromkeys(("vllm_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port"), f"{_SAMPLER}.url"),
    "vllm_group_port": f"{_SAMPLER}.group_port",
    "vllm_gpu_memory_utilization": f"{_SAMPLER}.gpu_memory",
    "vllm_enable_sleep_mode": f"{_SAMPLER}.sleep",
    **dict.fromkeys(
        (
            "vllm_importance_sampling_mode",
            "vllm_importance_sampling_cap",
            "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_clip_min",
        ),
        "training.sampler.correction, level, floor, cap, low, high and reject",
    ),
    **dict.fromkeys(
        (
            "beta",
            "epsilon",
            "epsilon_high",
            "delta",
            "loss_type",
            "importance_sampling_level",
            "scale_rewards",
            "sapo_temperature_pos",
            "sapo_temperature_neg",
            "vespo_k_pos",
            "vespo_k_neg",
            "vespo_lambda_pos",
            "vespo_lambda_neg",
            "use_bias_correction_kl",
            "off_policy_mask_threshold",
            "multi_objective_aggregation",
        ),
        _OBJECTIVE,
    ),
    **dict.fromkeys(("reward_weights", "max_tool_calling_iterations"), "the task"),
    **dict.fromkeys(
        (
            "router_aux_loss_coef",
            "label_smoothing_factor",
        ),
        _NO_TERM,
    ),
    "entropy_coef": "objective.entropy_bonus",
    **dict.fromkeys(
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target", "use_adaptive_entropy"),
        "training.entropy_control",
    ),
    "top_entropy_quantile": "objective.entropy_share",
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), "training.reference"),
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), "policy.dtype"),
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing"),
        "policy.gradient_checkpointing",
    ),
    "trust_remote_code": "policy.trust_remote_code",
    "chat_template_kwargs": "policy.chat_template",
    "disable_dropout": "nothing: klab trains without dropout",
    **dict.fromkeys(
        ("output_dir", "save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
        _CHECKPOINT,
    ),
    **dict.fromkeys(
        (
            "resume_from_checkpoint",
            "ignore_data_skip",
            "restore_callback_states_from_checkpoint",
            "enable_jit_checkpoint",
        ),
        _CHECKPOINT,
    ),
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_strategy",
            "hub_token",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
        ),
        "nothing: the trained policy is a folder of the run",
    ),
    **dict.fromkeys(
        ("eval_strategy", "do_eval", "eval_steps", "eval_on_start", "eval_delay", "per_device_eval_batch_size"),
        _EVALUATION,
    ),
    **dict.fromkeys(
        (
            "num_generations_eval",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
            "do_predict",
            "prediction_loss_only",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "include_for_metrics",
            "batch_eval_metrics",
        ),
        _EVALUATION,
    ),
    **dict.fromkeys(
        (
            "report_to",
            "run_name",
            "logging_strategy",
            "logging_steps",
            "logging_first_step",
            "logging_dir",
            "logging_nan_inf_filter",
            "log_on_each_node",
            "log_completions",
            "log_multimodal",
            "log_unique_prompts",
            "log_completions_hub_repo",
            "num_completions_to_print",
            "include_num_input_tokens_seen",
            "project",
            "trackio_space_id",
            "trackio_bucket_id",
            "trackio_static_space_id",
        ),
        _RECORD,
    ),
    "neftune_noise_alpha": "nothing: the log-probabilities of an update are those of the policy, without noise",
    **dict.fromkeys(
        (
            "shuffle_dataset",
            "remove_unused_columns",
            "dataloader_drop_last",
            "do_train",
            "train_sampling_strategy",
            "length_column_name",
            "label_names",
            "average_tokens_across_devices",
            "pad_to_multiple_of",
        ),
        _FIXED,
    ),
    "ddp_timeout": "resources.collective_minutes",
    "use_cpu": "--device",
}
"""Field of `GRPOConfig` -> the setting of the grid file that it follows from."""

_OTHER_DISTRIBUTION = ("top_k", "min_p", "repetition_penalty", "generation_kwargs")
"""Fields that let completions be drawn from another distribution than the policy's."""

_MODEL_KEYS = {
    "dtype": "policy.dtype",
    "torch_dtype": "policy.dtype",
    "revision": "policy.revision",
    "trust_remote_code": "policy.trust_remote_code",
}
"""Keys of `model_init_kwargs` that follow from other settings."""


def refuse_unsupported(training: TrainingSection, policy: PolicySection, objective: Objective) -> None:
    """Check that the cell's engine can train it.

    Raises:
        UserError: naming the setting that the engine has no place for.
    """
    if training.engine != "trl":
        return
    _refuse_training(training)
    _refuse_reference(training, policy, objective)
    _refuse_sampler(training, policy, objective)
    _refuse_fields(training)
    if not names_user_code(objective.advantage) and "logits" in value_of("advantage", objective.advantage).needs:
        raise _unsupported("objective.advantage", objective.advantage, "TRL keeps no logits of the whole update")
    if objective.entropy_share < 1.0:
        raise _unsupported(
            "objective.entropy_share", objective.entropy_share, "TRL keeps no entropies of the whole update"
        )
    if getattr(policy, "engine", "auto") == "stacked":
        raise UserError(
            "is klab's own engine for models, and training.engine: trl has its own",
            key="policy.engine",
            value="stacked",
            allowed=("auto", "transformers"),
        )
    if getattr(policy, "sharding", "none") != "none":
        raise UserError(
            "is klab's own way to share weights out, and training.engine: trl leaves that to its launcher",
            key="policy.sharding",
            value="full",
            allowed=("none",),
            hint="Name a configuration of Accelerate with FSDP in resources.launcher.",
        )


def _refuse_training(training: TrainingSection) -> None:
    absent = (
        ("lag", training.lag, 0, "TRL trains on what the current policy generated"),
        ("behaviour", training.behaviour, "policy", "TRL's rollouts come from the policy that is trained"),
        ("token_budget", training.token_budget, None, "TRL's micro-batches count trajectories: use micro_batch"),
    )
    for name, value, default, why in absent:
        if value != default:
            raise _unsupported(f"training.{name}", value, why)
    if training.equal_groups == "refill":
        raise _unsupported(
            "training.equal_groups", "refill", "TRL draws each rollout once: choose keep or drop", ("keep", "drop")
        )
    if training.equal_groups == "drop" and training.minibatches > 1:
        raise _unsupported(
            "training.minibatches",
            training.minibatches,
            "TRL's minibatches are trajectories of any group, so that equal_groups: drop has no whole groups to drop",
        )
    if training.critic is not None:
        raise _unsupported("training.critic", training.critic.kind, "GRPOTrainer has no critic: set it to null")
    if training.group_size == 1:
        raise _unsupported("training.group_size", 1, "GRPOTrainer needs at least 2 completions per prompt")


def _refuse_reference(training: TrainingSection, policy: PolicySection, objective: Objective) -> None:
    """TRL moves a whole model of its own (`sync_ref_model`), as klab does, and keeps no policy of an earlier update."""
    reference = training.reference
    if reference is None:
        return
    if reference.follows == "rollout":
        if keeps_copy(training, compares_distributions(objective, training.on_policy)):
            raise _unsupported(
                "objective.estimator", objective.estimator, "TRL keeps no copy of the policy that drew the rollout"
            )
    elif policy.lora is not None and "reference" not in idle_kl_settings(training, objective):
        raise _unsupported(
            "training.reference",
            "policy",
            "beside adapters TRL has no second model that could move: it switches them off",
        )


def _refuse_sampler(training: TrainingSection, policy: PolicySection, objective: Objective) -> None:
    sampler = training.sampler
    if sampler is None:
        return
    if sampler.engine != "vllm":
        raise _unsupported("training.sampler.engine", sampler.engine, "TRL samples by itself, or with vllm", ("vllm",))
    for name in ("dtype", "temperature"):
        if (value := getattr(sampler, name)) is not None:
            raise _unsupported(f"training.sampler.{name}", value, "TRL's vllm has the trainer's: set it to null")
    if sampler.adapters != "merged":
        raise _unsupported("training.sampler.adapters", sampler.adapters, "TRL merges them", ("merged",))
    if _needs_greedy(objective):
        raise _unsupported(
            "training.sampler.engine",
            "vllm",
            f"the greedy completions of {objective.advantage!r} come from the trainer",
        )


def _needs_greedy(objective: Objective) -> bool:
    name = objective.advantage
    return not names_user_code(name) and "greedy_rewards" in value_of("advantage", name).needs


def _refuse_fields(training: TrainingSection) -> None:
    fields: dict[str, Any] = {} if training.trl is None else training.trl.fields
    for name, value in fields.items():
        if name in SET_BY_KLAB:
            raise _set_by(f"training.trl.{name}", value, SET_BY_KLAB[name])
    model = fields.get("model_init_kwargs")
    for name, setting in _MODEL_KEYS.items():
        if isinstance(model, dict) and name in model:
            raise _set_by(f"training.trl.model_init_kwargs.{name}", model[name], setting)


def _set_by(key: str, value: Any, setting: str) -> UserError:
    return UserError("klab sets this field itself", key=key, value=value, hint=f"It follows from {setting}.")


def _unsupported(key: str, value: Any, why: str, allowed: tuple[str, ...] = ()) -> UserError:
    hint = "Or train this cell with training.engine: klab."
    return UserError(f"not with training.engine: trl: {why}", key=key, value=value, allowed=allowed, hint=hint)


def engine_notes(training: TrainingSection) -> Iterator[str]:
    """A line for each way in which a cell of this engine is not trained as klab's own engine would train it."""
    if training.engine != "trl":
        return
    if training.minibatches > 1:
        yield (
            f"training.minibatches: {training.minibatches} with engine: trl: each is a random part of the rollout's "
            "trajectories, not of its groups; statistics of groups and of the batch are those of the whole rollout"
        )
    fields = {} if training.trl is None else training.trl.fields
    if changed := [name for name in _OTHER_DISTRIBUTION if name in fields]:
        yield (
            f"training.trl: {', '.join(changed)} may let completions be drawn from another distribution than the "
            "policy's, whose log-probabilities the objective is given"
        )
    if training.sampler is not None:
        yield (
            "training.sampler.engine: vllm with engine: trl: vllm draws the rollouts, evaluations are sampled by the "
            "trainer, so that they are the same for every engine"
        )


def refuse_launcher(trainings: Iterable[TrainingSection]) -> None:
    """Raises UserError where `resources.launcher` would start cells that klab's own engine trains."""
    for training in trainings:
        if training.engine != "trl":
            raise UserError(
                "starts cells of training.engine: trl only, and this grid has others",
                key="resources.launcher",
                hint="klab's own engine starts its processes itself: leave it out, or split the grid.",
            )


def refuse_moving_references(trainings: Iterable[TrainingSection], kind: str | None) -> None:
    """Raises UserError where TRL would have to move a reference whose weights processes share out.

    Args:
        kind: `distributed_type` of the configuration of accelerate; None without one.
    """
    if kind not in ("FSDP", "DEEPSPEED"):
        return
    for training in trainings:
        if training.reference is not None and training.reference.follows == "policy":
            raise UserError(
                f"with training.engine: trl a reference moves where each process has the whole model, not with {kind}",
                key="training.reference",
                value="policy",
                hint="Leave the reference fixed, or choose another configuration in resources.launcher.",
            )


def refuse_unequal_shares(trainings: Iterable[TrainingSection], processes: int) -> None:
    """Raises UserError where the trajectories of an update on TRL are no multiple of the processes that share them."""
    for training in trainings:
        if training.engine == "trl":
            rows_per_pass(training, processes)


def rows_per_pass(training: TrainingSection, processes: int, halved: bool = False) -> tuple[int, int]:
    """Trajectories of one process in a forward pass on TRL, and how many such passes make an update.

    Args:
        processes: that train together; TRL gives each as many of an update's trajectories.
        halved: after memory ran out: half of what the cell asks for.

    Raises:
        UserError: the trajectories cannot be shared equally.
    """
    rows = training.prompts * training.group_size // training.minibatches
    if rows % processes:
        raise UserError(
            f"the {rows} trajectories of an update cannot be shared equally by {processes} processes, as TRL needs it",
            key="training.prompts",
            value=training.prompts,
            hint="Make prompts × group_size / minibatches a multiple of the number of processes.",
        )
    own = rows // processes
    most = min(own, training.micro_batch or own)
    most = max(1, most // 2) if halved else most
    parts = next(count for count in range(1, own + 1) if own % count == 0 and own // count <= most)
    return own // parts, parts
