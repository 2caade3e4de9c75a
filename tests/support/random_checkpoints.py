"""Random checkpoints of many architectures, small enough to train in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.support.transformers_tokenizer import character_tokenizer

SHARED: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
LATER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
SIZES: dict[str, dict[str, Any]] = {
    "Llama": LATER,
    "Qwen2": {name: value for name, value in LATER.items() if name != "head_dim"},
    "Gemma": LATER,
    "Gemma2": {**LATER, "sliding_window": 8},
    "Mistral": {**LATER, "sliding_window": 8},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2},
    "OPT": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "init_std": 0.2,
    },
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "Mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.2},
}
"""GPT-2 and OPT learn positions, Bloom has none, Mistral and Gemma 2 slide, Mamba does not attend."""


def checkpoint(folder: Path, family: str, tokenizer: PreTrainedTokenizerFast | str, **changes: Any) -> Path:
    """A random model of a family with its tokenizer (or the characters of one) as an ordinary checkpoint folder."""
    if isinstance(tokenizer, str):
        tokenizer = character_tokenizer(tokenizer)
    settings = {"vocab_size": len(tokenizer), **SHARED, **SIZES[family], **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**settings)).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    tokenizer.save_pretrained(str(folder))
    return folder
