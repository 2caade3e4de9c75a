"""Models of real size with random weights, and a task for them: what `gpu` and `against_trl` train.

Nothing heavy is imported before a checkpoint is made: TRL's process reads this too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from klab.tasks import Example, Score

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Shape:
    """A model and the size of its updates; without `lora_rank` all weights are trained.

    `clock` is one of `clock.CLOCKS`.
    """

    config: dict[str, Any]
    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    micro_batch: int | None
    dtype: str
    packs: tuple[int, ...]
    lora_rank: int | None = 16
    clock: str = "wall"


SHAPES = {
    "qwen2.5-0.5b": Shape(
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
        },
        prompts=16,
        group_size=8,
        prompt_tokens=128,
        new_tokens=256,
        micro_batch=64,
        dtype="bfloat16",
        packs=(2, 4),
    ),
    "toy": Shape(
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        },
        prompts=2,
        group_size=4,
        prompt_tokens=6,
        new_tokens=12,
        micro_batch=4,
        dtype="bfloat16",
        packs=(2,),
    ),
    "qwen2-10m": Shape(
        {
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
        },
        prompts=4,
        group_size=8,
        prompt_tokens=64,
        new_tokens=64,
        micro_batch=None,
        dtype="float32",
        packs=(2,),
        lora_rank=None,
        clock="processor",
    ),
}
SHAPES["qwen2-10m, adapters"] = replace(SHAPES["qwen2-10m"], lora_rank=16)


class Strings:
    """Prompts of random letters, one token each; the reward is the share of vowels, so that gradients are not zero."""

    name, alphabet, max_new_tokens, interactive = "strings", LETTERS, 16, False

    def __init__(self, length: int) -> None:
        self.length = length

    def split(self, name: Literal["train", "held_out"]) -> list[Example]:
        draw = random.Random(name)
        return [Example("".join(draw.choices(LETTERS, k=self.length)), "") for _ in range(256)]

    def score(self, example: Example, completion: str) -> Score:
        share = sum(letter in "aeiou" for letter in completion) / max(1, len(completion))
        return Score(share + 1e-3 * (len(completion) % 7), False)

    def respond(self, example: Example, transcript: str) -> str | None:
        return None


def write_start(folder: Path, shape: Shape) -> Path:
    """A checkpoint with random weights, whose tokens are letters and names without meaning."""
    import torch
    from transformers import Qwen2Config

    from klab.harness.policy.stacked.policy import StackedPolicy
    from tests.support.transformers_tokenizer import character_tokenizer

    tokenizer = character_tokenizer(LETTERS, shape.config["vocab_size"])
    config = Qwen2Config(
        **shape.config, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id
    )
    StackedPolicy.random(config, tokenizer, [0], dtype=getattr(torch, shape.dtype)).save(folder, 0)
    return folder
