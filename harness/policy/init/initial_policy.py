"""The initial policy of a cell, also its reference: a pretrained checkpoint, or a tiny or small model trained here."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from klab.grid.errors import UserError
from klab.grid.schema.task import ProxyTask
from klab.harness.policy.char_tokenizer import CharacterTokenizer
from klab.harness.policy.init.bpe_tokenizer import bpe_tokenizer
from klab.harness.policy.init.sft_warmup import SMALL, TINY, Progress, warm_up
from klab.harness.policy.init.shared_folder import made_once, make_whole
from klab.harness.policy.pretrained import model_folder
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.harness.policy.stated_config import StatedConfig
from klab.tasks.task import TURN_END, Task, alphabet_of, require_solutions

_TRAINING_FIELDS = ("lora", "gradient_checkpointing")
"""Fields of the policy section that say how it is trained, not where it starts."""

_OTHER_FORMATS = ["*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.tflite", "*.ot", "original/*"]
"""Files of a model on the hub that PyTorch does not read."""

RECORD = "warmup.json"
WARMUP_VERSION = 1
"""Version of the warm-up procedure, part of every digest."""

TOKENIZER_TEXTS = 4096
"""Texts of the training split on which a small policy's tokenizer is trained."""


def initial_policy(section: Any, task: Task, task_section: Any, cache: Path, progress: Progress | None = None) -> Path:
    """The folder of the checkpoint that a cell starts from.

    A `tiny` or `small` policy is trained once per (policy section, task section): its folder is named by a hash of
    both, built under a file lock and renamed into place when complete, so that any number of processes may ask for it
    at once.

    Args:
        section: the grid's policy section.
        task: the task to warm up on.
        task_section: its section; identifies it.
        cache: the folder of shared policies.
        progress: called as `progress(update, updates_max, accuracy)` after each evaluation of a warm-up.

    Raises:
        UserError: no such checkpoint; a task without alphabet or solutions; a warm-up that ends outside 0.2..0.5.
    """
    if section.name == "hf":
        return model_folder(section.model, section.revision, ignore_patterns=_OTHER_FORMATS)
    return made_once(
        Path(cache) / policy_digest(section, task_section),
        RECORD,
        lambda scratch: write_policy(scratch, section, task, task_section, progress),
    )


class Made(NamedTuple):
    """A policy in a folder: the record of how it was made, and whether that was just now."""

    record: dict[str, Any]
    new: bool


def policy_in_folder(
    folder: Path, section: Any, task: Task, task_section: Any, progress: Progress | None = None
) -> Made:
    """Make a tiny or small policy as a checkpoint in a folder of the user's, unless it holds that very policy.

    What is interrupted leaves nothing, and is begun anew the next time.

    Raises:
        UserError: the folder holds something else; and as `initial_policy`.
    """
    folder = Path(folder)
    known = _same_policy(folder, section, task_section)
    if known is not None:
        return Made(known, False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        make_whole(folder, lambda scratch: write_policy(scratch, section, task, task_section, progress))
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    made = _same_policy(folder, section, task_section)
    assert made is not None
    return Made(made, True)


def _same_policy(folder: Path, section: Any, task_section: Any) -> dict[str, Any] | None:
    """The record of the policy in a folder, which must be the one that is wanted; None for an empty or no folder."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        raise UserError("holds something else, which is not overwritten", key="--out", value=str(folder)) from None
    wanted = json.loads(json.dumps(_identity(section, task_section)))
    different = [f"{part}.{name}" for part in ("policy", "task") for name in _differing(wanted[part], record.get(part))]
    if different or record.get("version") != wanted["version"]:
        raise UserError(
            f"holds a model that was made with other settings ({', '.join(different) or 'version'})",
            key="--out",
            value=str(folder),
            hint="Name another folder, or remove this one.",
        )
    return record


def _differing(wanted: dict[str, Any], found: Any) -> list[str]:
    found = found if isinstance(found, dict) else {}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def policy_digest(section: Any, task_section: Any) -> str:
    """Name of a tiny or small policy's folder: 16 hexadecimal digits of the SHA-256 of all that it is made from."""
    return hashlib.sha256(json.dumps(_identity(section, task_section), sort_keys=True).encode()).hexdigest()[:16]


def _identity(section: Any, task_section: Any) -> dict[str, Any]:
    policy = {name: value for name, value in _fields(section).items() if name not in _TRAINING_FIELDS}
    # Proxies of one task start from one policy, which was warmed up on that task.
    warmed_up_on = task_section.gold if isinstance(task_section, ProxyTask) else task_section
    return {"version": WARMUP_VERSION, "policy": policy, "task": _fields(warmed_up_on)}


def tiny_config(section: Any, vocabulary: int, end: int, pad: int, context: int) -> StatedConfig:
    """The configuration of a tiny or small policy."""
    return StatedConfig.of_family(
        section.family,
        vocab_size=vocabulary,
        hidden_size=section.hidden,
        intermediate_size=section.intermediate,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads,
        num_key_value_heads=section.kv_heads or section.heads,
        max_position_embeddings=context,
        initializer_range=section.hidden**-0.5,
        eos_token_id=end,
        pad_token_id=pad,
    )


def write_policy(
    folder: Path, section: Any, task: Task, task_section: Any, progress: Progress | None = None
) -> dict[str, Any]:
    """Train a tiny or small policy and write it into an empty folder, with the record of how it was made.

    Returns:
        the record, as `RECORD` in the folder has it.

    Raises:
        UserError: as `initial_policy`.
    """
    small = section.name == "small"
    tokenizer: Any = (
        _tokenizer(task, section.vocabulary) if small else CharacterTokenizer.of_alphabet(alphabet_of(task))
    )
    longest = max(len(example.prompt) for example in task.split("train")[:256])
    config = tiny_config(section, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, max(256, 4 * longest))
    policy = StackedPolicy.random(config, tokenizer, [section.warmup_seed], dtype=getattr(torch, section.dtype))
    record = warm_up(
        policy,
        task,
        section.warmup_accuracy,
        section.warmup_updates_max,
        section.warmup_seed,
        progress,
        SMALL if small else TINY,
    )
    policy.save(folder)
    written = {"schema": 1, **_identity(section, task_section), **record}
    (folder / RECORD).write_text(json.dumps(written, indent=1))
    return written


def _tokenizer(task: Task, size: int) -> Any:
    """Byte-level BPE, trained on texts of the task."""
    require_solutions(task)
    train = task.split("train")
    examples = train[: min(TOKENIZER_TEXTS, len(train))]
    return bpe_tokenizer([each.prompt + each.solution.replace(TURN_END, "") for each in examples], size)


def _fields(section: Any) -> dict[str, Any]:
    return dict(section.model_dump(mode="json")) if hasattr(section, "model_dump") else dict(vars(section))
