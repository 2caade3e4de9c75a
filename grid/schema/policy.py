"""The `policy` section of a grid file: which language model is trained, and which of its weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from klab.grid.schema.base import Count, Positive, Section


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021): W + (alpha/rank)·B·A on every target matrix, everything else frozen.

    The reference policy is the same model with its adapters off.
    """

    rank: Count = 16
    """Rank r of the two factors."""
    alpha: Positive = 32.0
    """Scale: the adapter is multiplied by alpha/rank."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the model's linear layers as `transformers` has them (`q_proj`), or `all-linear`: all but the output
    layer."""


class TinyPolicy(Section):
    """A small transformer from scratch, warmed up on the task's solutions; it is also the reference policy."""

    name: Literal["tiny"] = "tiny"
    family: Literal["llama", "qwen2", "qwen3"] = "llama"
    """Architecture of the decoder."""
    hidden: Annotated[int, Field(ge=4, le=4096)] = 64
    """Width of the residual stream; an even multiple of `heads`."""
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    """Number of layers."""
    heads: Count = 4
    """Attention heads."""
    kv_heads: Count | None = None
    """Key and value heads (grouped-query attention), a divisor of `heads`; null: as many as `heads`."""
    intermediate: Count = 192
    """Width of the feed-forward layers."""
    warmup_accuracy: Annotated[float, Field(ge=0.2, le=0.5)] = 0.35
    """Supervised warm-up stops at this accuracy on the task; the result is the starting and the reference policy."""
    warmup_updates_max: Count = 4000
    """Most updates of the warm-up."""
    warmup_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights and of the warm-up; shared by all cells, whatever their own seed."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of weights and computation."""
    lora: Lora | None = None
    """Train low-rank adapters instead of all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same gradient."""


class HfPolicy(Section):
    """A pretrained causal language model; it is also the reference policy."""

    name: Literal["hf"] = "hf"
    model: str
    """Hub id, or a folder with a checkpoint."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository; null: the default branch."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Precision of the computation; beside 16 bits the optimizer keeps float32 master weights."""
    lora: Lora | None = None
    """Train low-rank adapters instead of all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same gradient."""
    engine: Literal["auto", "stacked", "transformers"] = "auto"
    """What runs the model: klab's stacked engine (Llama, Qwen2, Qwen3) or `transformers`; `auto` takes the first that
    can."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Whether prompts are wrapped in the tokenizer's chat template; `auto`: where it has one."""
    trust_remote_code: bool = False
    """Let `transformers` run code from the model repository."""


PolicySection = TinyPolicy | HfPolicy
POLICIES: dict[str, type[Section]] = {"tiny": TinyPolicy, "hf": HfPolicy}
