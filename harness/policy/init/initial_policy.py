"""The initial policy of a cell, also its reference: a pretrained checkpoint, or a tiny model warmed up here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from klab.grid.schema.task import ProxyTask
from klab.harness.policy.init.char_tokenizer import character_tokenizer
from klab.harness.policy.init.sft_warmup import Progress, warm_up
from klab.harness.policy.init.shared_folder import made_once
from klab.harness.policy.pretrained import model_folder
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.tasks.task import Task, alphabet_of

_TRAINING_FIELDS = ("lora", "gradient_checkpointing")
"""Fields of the policy section that say how it is trained, not where it starts."""

_OTHER_FORMATS = ["*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.tflite", "*.ot", "original/*"]
"""Files of a model on the hub that PyTorch does not read."""

RECORD = "warmup.json"
WARMUP_VERSION = 1
"""Version of the warm-up procedure, part of every digest."""


def initial_policy(section: Any, task: Task, task_section: Any, cache: Path, progress: Progress | None = None) -> Path:
    """The folder of the checkpoint that a cell starts from.

    A `tiny` policy is trained once per (policy section, task section): its folder is named by a hash of both, built
    under a file lock and renamed into place when complete, so that any number of processes may ask for it at once.

    Args:
        section: the grid's policy section, `tiny` or `hf`.
        task: the task to warm up on.
        task_section: its section; identifies it.
        cache: the folder of shared policies.
        progress: called as `progress(update, updates_max, accuracy)` after each evaluation of a warm-up.

    Raises:
        UserError: no such checkpoint; a task without alphabet or solutions; a warm-up that ends outside 0.2..0.5.
    """
    if section.name != "tiny":
        return model_folder(section.model, section.revision, ignore_patterns=_OTHER_FORMATS)
    return made_once(
        Path(cache) / policy_digest(section, task_section),
        RECORD,
        lambda scratch: _build(scratch, section, task, task_section, progress),
    )


def policy_digest(section: Any, task_section: Any) -> str:
    """Name of a tiny policy's folder: 16 hexadecimal digits of the SHA-256 of all that it is made from."""
    return hashlib.sha256(json.dumps(_identity(section, task_section), sort_keys=True).encode()).hexdigest()[:16]


def _identity(section: Any, task_section: Any) -> dict[str, Any]:
    policy = {name: value for name, value in _fields(section).items() if name not in _TRAINING_FIELDS}
    # Proxies of one task start from one policy, which was warmed up on that task.
    warmed_up_on = task_section.gold if isinstance(task_section, ProxyTask) else task_section
    return {"version": WARMUP_VERSION, "policy": policy, "task": _fields(warmed_up_on)}


def tiny_config(section: Any, vocabulary: int, end: int, pad: int, context: int) -> Any:
    """The transformers configuration of a tiny policy."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    families = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    own = {"head_dim": section.hidden // section.heads} if section.family == "qwen3" else {}
    return families[section.family](
        vocab_size=vocabulary,
        hidden_size=section.hidden,
        intermediate_size=section.intermediate,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads,
        num_key_value_heads=section.kv_heads or section.heads,
        max_position_embeddings=context,
        initializer_range=section.hidden**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        **own,
    )


def _build(folder: Path, section: Any, task: Task, task_section: Any, progress: Progress | None) -> None:
    tokenizer = character_tokenizer(alphabet_of(task))
    longest = max(len(example.prompt) for example in task.split("train")[:256])
    config = tiny_config(
        section, len(tokenizer), int(tokenizer.eos_token_id), int(tokenizer.pad_token_id), max(256, 4 * longest)
    )
    policy = StackedPolicy.random(config, tokenizer, [section.warmup_seed], dtype=getattr(torch, section.dtype))
    record = warm_up(policy, task, section.warmup_accuracy, section.warmup_updates_max, section.warmup_seed, progress)
    policy.save(folder)
    (folder / RECORD).write_text(json.dumps({"schema": 1, **_identity(section, task_section), **record}, indent=1))


def _fields(section: Any) -> dict[str, Any]:
    return dict(section.model_dump(mode="json")) if hasattr(section, "model_dump") else dict(vars(section))
