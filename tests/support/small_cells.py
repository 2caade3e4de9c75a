"""Small cells for tests that start real processes: a task as slow or broken as one likes, its grid, equal bits."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal

from klab.harness.store import Run
from klab.tasks import Example, Score

LETTERS = "abcd"
TRAINING: dict[str, Any] = {
    "updates": 6,
    "prompts": 2,
    "group_size": 2,
    "lr": 0.01,
    "evaluate_every": 50,
    "evaluation_prompts": 2,
    "evaluation_samples": 1,
    "final_evaluation_samples": 1,
    "checkpoint_updates": 5,
}


class Letters:
    """Prompt: three letters. Reward: the share of the four tokens that repeat the prompt's first letter.

    Args:
        seconds: how long each reward takes; not at all where KLAB_TEST_HURRY is set.
        trouble: "" for none, "raise", "type", "hang", "memory" (exceeded), "exit", "kill" (its own process).
    """

    name = "letters"
    alphabet = LETTERS
    max_new_tokens = 4
    interactive = False

    def __init__(self, seconds: float = 0.0, trouble: str = "") -> None:
        self.seconds, self.trouble = seconds, trouble

    def split(self, name: Literal["train", "held_out"]) -> list[Example]:
        words = ["".join(letters) for letters in product(LETTERS, repeat=3)]
        chosen = words[::4] if name == "held_out" else [word for i, word in enumerate(words) if i % 4]
        return [Example(word, word[0]) for word in chosen]

    def score(self, example: Example, completion: str) -> Score:
        time.sleep(0 if os.environ.get("KLAB_TEST_HURRY") else self.seconds)
        share = completion.count(example.answer) / 4
        match self.trouble:
            case "raise":
                raise RuntimeError("the reward is broken")
            case "type":
                return share  # type: ignore[return-value]
            case "hang":
                time.sleep(3600)
            case "memory":
                raise MemoryError("out of memory in the reward")
            case "exit":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return Score(share, share >= 0.5)

    def respond(self, example: Example, transcript: str) -> str | None:
        return None


def small_policy(folder: Path, alphabet: str = LETTERS) -> Path:
    """A checkpoint of a random Llama with one layer that knows some characters, as a Hugging Face folder."""
    from klab.grid.schema.sections import TinyPolicy
    from klab.harness.policy.init.initial_policy import tiny_config
    from klab.harness.policy.stacked.policy import StackedPolicy
    from tests.support.transformers_tokenizer import character_tokenizer

    tokenizer = character_tokenizer(alphabet)
    section = TinyPolicy(hidden=16, layers=1, heads=2, intermediate=32)
    config = tiny_config(section, len(tokenizer), int(tokenizer.eos_token_id), int(tokenizer.pad_token_id), 64)
    StackedPolicy.random(config, tokenizer, [3]).save(folder, 0)
    return folder


def write_grid(
    file: Path,
    policy: Path,
    *,
    training: Mapping[str, Any] | None = None,
    task: Mapping[str, Any] | None = None,
    cells: list[dict[str, Any]] | None = None,
    seeds: int = 1,
    resources: Mapping[str, Any] | None = None,
    policy_settings: Mapping[str, Any] | None = None,
) -> Path:
    """A grid file named as its stem, with one configuration per entry of `cells`."""
    grid = {
        "name": file.stem,
        "task": {"name": "tests.support.small_cells:Letters", **(task or {})},
        "policy": {"name": "hf", "model": str(policy), **(policy_settings or {})},
        "training": {**TRAINING, **(training or {})},
        "objective": {},
        "design": "list",
        "cells": cells or [{}],
        "seeds": seeds,
        "resources": {"memory_gb": 1, **(resources or {})},
    }
    file.write_text(json.dumps(grid))
    return file


def numbers(run: Run, identity: str) -> dict[str, Any]:
    """Everything a cell recorded and learnt, but times and machines."""
    from klab.harness.training.metrics import same_numbers

    folder = run.cell(identity)
    result = folder.result()
    return {
        "metrics": [same_numbers(row) for row in folder.metrics()],
        "evaluations": [same_numbers(row) for row in folder.evaluations()],
        "result": result and {k: v for k, v in same_numbers(result).items() if k not in ("versions", "hardware")},
        "policy": (folder.policy / "model.safetensors").read_bytes(),
    }


def assert_same(left: Run, right: Run) -> None:
    """Every cell of two runs has the same bits, and every update exactly once."""
    assert left.cells == right.cells
    for identity in left.cells:
        mine, theirs = numbers(left, identity), numbers(right, identity)
        planned = left.resolved(identity)["training"]["updates"]
        assert [row["update"] for row in mine["metrics"]] == list(range(1, planned + 1))
        assert mine == theirs
