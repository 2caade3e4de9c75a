"""Small policies and hand-made rollouts for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from klab.harness.policy.rollout import Rollout
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.support.transformers_tokenizer import character_tokenizer

ALPHABET = "0123456789+="
SIZES = {
    "vocab_size": 15,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def configuration(family: str = "llama", **changes: Any) -> Any:
    return FAMILIES[family](**{**SIZES, **changes})


def decoder(cells: int = 1, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> StackedPolicy:
    """Random cells with seeds 0, 1, …"""
    return StackedPolicy.random(
        configuration(family, **changes), character_tokenizer(ALPHABET), range(cells), dtype=dtype
    )


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def written(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    own: Sequence[Sequence[bool]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Rollout:
    """A rollout of given token ids, all of them the policy's own unless `own` says otherwise."""
    T = max(len(row) for row in completions)
    N = len(completions)
    tokens, mask = torch.zeros(N, T, dtype=torch.long), torch.zeros(N, T, dtype=torch.bool)
    present = torch.zeros(N, T, dtype=torch.bool)
    for i, row in enumerate(completions):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        present[i, : len(row)] = True
        mask[i, : len(row)] = True if own is None else torch.tensor(own[i])
    return Rollout(
        prompts=[list(prompt) for prompt in prompts],
        group_size=N // len(prompts),
        tokens=tokens,
        mask=mask,
        present=present,
        logp=torch.zeros(N, T, dtype=dtype),
        truncated=torch.zeros(N, dtype=torch.bool),
        texts=[""] * N,
    )
