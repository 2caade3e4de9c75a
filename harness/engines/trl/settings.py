"""A cell's settings as arguments of `trl.GRPOConfig`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from klab.grid.engines import rows_per_pass
from klab.grid.errors import UserError
from klab.grid.schema.sampler import Sampler
from klab.grid.schema.training import TrainingSection
from klab.harness.training.distributed.rendezvous import COLLECTIVE_MINUTES
from klab.harness.training.packed_cell import PackedCell
from klab.harness.training.runtime.rng import derived_seed

_NO_CLIPPING = 1e30
"""Largest gradient norm where `training.clip_norm` is null: TRL measures the norm only where it clips."""


def grpo_arguments(
    member: PackedCell,
    folder: Path,
    processes: int,
    ends: list[int],
    *,
    on_cpu: bool,
    halved: bool = False,
    minutes: float = COLLECTIVE_MINUTES,
) -> dict[str, Any]:
    """The arguments of `trl.GRPOConfig`, the user's own fields included.

    The loss settings of TRL are left alone, for klab's objective is the loss; `beta` only makes TRL keep a reference
    model, whose log-probabilities the objective and the records need.

    Args:
        folder: where TRL writes checkpoints.
        processes: that train together.
        ends: the tokens that end a completion.
        on_cpu: whether GPUs are left alone.
        halved: see `rows_per_pass`.
        minutes: how long processes may wait for one another.
    """
    training, policy = member.cell.training, member.cell.policy
    written = {} if training.trl is None else training.trl.fields
    rows, parts = rows_per_pass(training, processes, halved)
    # beside 16-bit computation all trained weights are float32, and frozen ones may be narrow
    narrow = policy.dtype == "bfloat16"
    dtype = "float32" if narrow and policy.lora is None else policy.dtype
    model = {"dtype": getattr(torch, dtype)}
    arguments: dict[str, Any] = {
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": not on_cpu,
        **({"ddp_backend": "gloo"} if on_cpu and processes > 1 else {}),
        **written,
        "model_init_kwargs": {**(written.get("model_init_kwargs") or {}), **model},
        "output_dir": str(folder),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": parts,
        "steps_per_generation": parts * training.minibatches,
        "num_generations": training.group_size,
        "num_iterations": training.updates_per_rollout,
        "max_completion_length": member.max_new_tokens,
        "max_steps": training.updates,
        "temperature": training.temperature,
        "top_p": training.top_p,
        "beta": 1.0,
        "loss_type": "grpo",
        "learning_rate": training.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": training.adam_eps,
        "max_grad_norm": _NO_CLIPPING if training.clip_norm is None else training.clip_norm,
        "bf16": narrow,
        "fp16": False,
        "gradient_checkpointing": policy.gradient_checkpointing,
        "trust_remote_code": bool(getattr(policy, "trust_remote_code", False)),
        "disable_dropout": True,
        "router_aux_loss_coef": 0.0,
        "shuffle_dataset": False,
        "remove_unused_columns": False,
        "ddp_timeout": math.ceil(60 * minutes),
        "seed": derived_seed("trl", member.cell.seed) % 2**31,
        "use_cpu": on_cpu,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
    }
    if training.reference is not None and training.reference.follows == "policy":
        arguments |= {
            "sync_ref_model": True,
            "ref_model_mixup_alpha": 1.0 - training.reference.ema,
            "ref_model_sync_steps": training.reference.update_every,
        }
    if training.sampler is not None:
        arguments |= _vllm_arguments(training.sampler)
        own = written.get("generation_kwargs") or {}
        arguments["generation_kwargs"] = {"stop_token_ids": ends, **own}
    return arguments


def _vllm_arguments(sampler: Sampler) -> dict[str, Any]:
    """How vLLM draws. TRL computes its log-probabilities; the factors of tokens are klab's own."""
    shared = {"use_vllm": True, "vllm_importance_sampling_correction": True}
    if sampler.url is None:
        own = {"vllm_gpu_memory_utilization": sampler.gpu_memory, "vllm_enable_sleep_mode": sampler.sleep}
        return {**shared, "vllm_mode": "colocate", **own}
    where = {"vllm_server_base_url": sampler.url, "vllm_group_port": sampler.group_port}
    return {**shared, "vllm_mode": "server", **where}


def check_fields(training: TrainingSection) -> None:
    """Check that the fields under `training.trl` are fields of `GRPOConfig`. Imports TRL.

    Raises:
        UserError: TRL is not installed, or has no such field.
    """
    config = require_trl().GRPOConfig
    known = set(config.__dataclass_fields__)
    for name in {} if training.trl is None else training.trl.fields:
        if name not in known:
            raise UserError("GRPOConfig has no such field", key="training.trl", value=name, allowed=sorted(known))


def require_trl() -> Any:
    """The package `trl`.

    Raises:
        UserError: it is not installed, or is a version whose trainer klab does not know.
    """
    try:
        import trl
    except ImportError as error:
        raise UserError(
            "trl is not installed",
            key="training.engine",
            value="trl",
            hint="Install it with pip install 'klab[trl]', or choose the engine klab.",
        ) from error
    if not str(trl.__version__).startswith("1.16."):
        raise UserError(
            f"trl {trl.__version__} is installed, and klab's trainer is made for 1.16",
            key="training.engine",
            value="trl",
            hint="pip install 'klab[trl]' brings the version that is tested.",
        )
    return trl
