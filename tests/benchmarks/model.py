"""The policy of the comparison with TRL: a Llama of 0.86 million parameters over 32 symbols, warmed up on three-digit
addition. Made once per folder; about two minutes on one core."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from klab.harness.policy.init.initial_policy import tiny_config
from klab.harness.policy.init.sft_warmup import warm_up
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.tasks.addition import Addition
from tests.benchmarks.setting import CONTEXT, DIGITS, HEADS, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY
from tests.support.transformers_tokenizer import character_tokenizer

SIZES = SimpleNamespace(
    family="llama", hidden=HIDDEN, layers=LAYERS, heads=HEADS, kv_heads=None, intermediate=INTERMEDIATE
)
ACCURACY, UPDATES_MAX, SEED = 0.3, 4000, 0
NEVER = "<unused0>"
"""A symbol that no solution has, hence one that the warmed-up policy does not write."""


def starting_checkpoint(folder: Path, progress: Callable[[int, int, float], None] | None = None) -> Path:
    """An ordinary Hugging Face folder that both trainers start from."""
    target = folder / "start"
    if (target / "config.json").exists():
        return target
    task = Addition(DIGITS)
    tokenizer = character_tokenizer(task.alphabet, VOCABULARY)
    config = tiny_config(SIZES, VOCABULARY, int(tokenizer.eos_token_id), int(tokenizer.pad_token_id), CONTEXT)
    policy = StackedPolicy.random(config, tokenizer, [SEED])
    warm_up(policy, task, ACCURACY, UPDATES_MAX, SEED, progress)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".start-", dir=folder))
    policy.save(scratch)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)
    return target


def endless_checkpoint(start: Path) -> Path:
    """The same weights with an end token that never comes: every completion uses up its budget, in both trainers."""
    target = start.with_name("endless")
    if target.exists():
        return target
    scratch = Path(tempfile.mkdtemp(prefix=".endless-", dir=start.parent))
    shutil.copytree(start, scratch, dirs_exist_ok=True)
    end = json.loads((start / "tokenizer.json").read_text())["model"]["vocab"][NEVER]
    for name, key, value in (
        ("config.json", "eos_token_id", end),
        ("generation_config.json", "eos_token_id", end),
        ("tokenizer_config.json", "eos_token", NEVER),
    ):
        file = scratch / name
        if file.exists():
            file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    os.replace(scratch, target)
    return target
