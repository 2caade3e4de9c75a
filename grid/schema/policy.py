"""The `policy` section of a grid file: which language model is trained, and which of its weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from klab.grid.schema.base import Count, Positive, Section


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021): W + (alpha/rank)·B·A on every target matrix, everything else frozen.

    The reference policy is the same model with its adapters off. ``targets`` are names of the model's linear layers
    as `transformers` has them (``q_proj``), or ``all-linear``: every one but the output layer.
    """

    rank: Count = 16
    alpha: Positive = 32.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class TinyPolicy(Section):
    """A small transformer from scratch, warmed up on the task's solutions; it is also the reference policy."""

    name: Literal["tiny"] = "tiny"
    family: Literal["llama", "qwen2", "qwen3"] = "llama"
    hidden: Annotated[int, Field(ge=4, le=4096)] = 64
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    heads: Count = 4
    kv_heads: Count | None = None
    intermediate: Count = 192
    warmup_accuracy: Annotated[float, Field(ge=0.2, le=0.5)] = 0.35
    warmup_updates_max: Count = 4000
    warmup_seed: Annotated[int, Field(ge=0)] = 0
    dtype: Literal["float32", "float64"] = "float32"
    lora: Lora | None = None
    gradient_checkpointing: bool = False


class HfPolicy(Section):
    """A pretrained causal language model from a hub id or a folder.

    Llama, Qwen2 and Qwen3 run in the stacked decoder, every other architecture through `transformers`; ``engine``
    forces one of them. ``chat_template`` says whether prompts are wrapped by the tokenizer's template: ``auto`` where
    it has one.
    """

    name: Literal["hf"] = "hf"
    model: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    lora: Lora | None = None
    gradient_checkpointing: bool = False
    engine: Literal["auto", "stacked", "transformers"] = "auto"
    chat_template: Literal["auto", "always", "never"] = "auto"
    trust_remote_code: bool = False


PolicySection = TinyPolicy | HfPolicy
POLICIES: dict[str, type[Section]] = {"tiny": TinyPolicy, "hf": HfPolicy}
