"""The `policy` section of a grid file: which language model is trained, and which of its weights."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from klab.grid.errors import UserError
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


class ScratchPolicy(Section):
    """A transformer from scratch, trained on the task before the first cell starts; it is also the reference policy."""

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


class TinyPolicy(ScratchPolicy):
    """A small transformer from scratch that reads characters, warmed up on the task's solutions; it is also the
    reference policy."""

    name: Literal["tiny"] = "tiny"


class SmallPolicy(ScratchPolicy):
    """A transformer of a few million parameters that reads byte-level BPE tokens. Tokenizer and weights are made here
    from the text of the task's training split: prompts with their solutions, the weights by next-token prediction until
    `warmup_accuracy` is reached. It is also the reference policy."""

    name: Literal["small"] = "small"
    family: Literal["llama", "qwen2", "qwen3"] = "qwen2"
    """Architecture of the decoder."""
    hidden: Annotated[int, Field(ge=4, le=4096)] = 192
    """Width of the residual stream; an even multiple of `heads`."""
    layers: Annotated[int, Field(ge=1, le=64)] = 4
    """Number of layers."""
    heads: Count = 6
    """Attention heads."""
    kv_heads: Count | None = 2
    """Key and value heads (grouped-query attention), a divisor of `heads`; null: as many as `heads`."""
    intermediate: Count = 640
    """Width of the feed-forward layers."""
    vocabulary: Annotated[int, Field(ge=300, le=65536)] = 1024
    """Most tokens of the tokenizer: 256 bytes, two special tokens, and merges, of which plain text may have fewer."""
    warmup_accuracy: Annotated[float, Field(ge=0.2, le=0.5)] = 0.3
    """Pretraining stops at this accuracy on the task; the result is the starting and the reference policy."""
    warmup_updates_max: Count = 2000
    """Most updates of pretraining."""


class HfPolicy(Section):
    """A pretrained causal language model; it is also the reference policy."""

    name: Literal["hf"] = "hf"
    model: str
    """Hub id, or a folder with a checkpoint."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository; null: the default branch."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float64"], Field(validate_default=True)] = "auto"
    """Precision of the computation; beside 16 bits the optimizer keeps float32 master weights. `auto`: bfloat16 where
    `resources` ask for GPUs that have it, else float32; the cell records which. float32 products never use TF32."""
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
    sharding: Literal["none", "full"] = "none"
    """`full`: the processes of a job share out weights, gradients, moments and the reference (FSDP2), on the
    `transformers` engine; `none`: each of them holds everything."""
    offload: Literal["none", "cpu"] = "none"
    """With `sharding: full`, where each process keeps its share between uses: on its GPU, or (`cpu`) in host memory,
    where steps are made too."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _has_no_loss_scaling(cls, given: object) -> object:
        """Refuses float16, in which gradients below 6e-8 vanish and whose losses nothing here scales up."""
        if given == "float16":
            raise UserError(
                "gradients below 6e-8 would be lost, for losses are not scaled",
                value=given,
                hint="bfloat16 has float32's range; training.sampler.dtype may be float16.",
            )
        return given

    @field_validator("dtype")
    @classmethod
    def _resolved(cls, chosen: str) -> str:
        """A section by itself asks for no GPU; of a grid file see `automatic_dtype`."""
        return "float32" if chosen == "auto" else chosen


PolicySection = TinyPolicy | SmallPolicy | HfPolicy
POLICIES: dict[str, type[Section]] = {"tiny": TinyPolicy, "small": SmallPolicy, "hf": HfPolicy}

_WITHOUT_BFLOAT16 = re.compile(
    r"(?<![a-z0-9])(v100|t4|p100|p40|p4|k80|m40|m60|titan|gtx|rtx_?20|rtx_?[4568]000$|20[678]0)", re.IGNORECASE
)
"""Types of GPUs before NVIDIA's Ampere, as clusters name them."""


def automatic_dtype(gpus: int, gpu_type: str | None) -> str:
    """What `policy.dtype: auto` means in a grid file whose `resources` ask for these GPUs.

    >>> automatic_dtype(0, None), automatic_dtype(1, None), automatic_dtype(8, "h100"), automatic_dtype(2, "v100")
    ('float32', 'bfloat16', 'bfloat16', 'float32')
    """
    has_it = gpus > 0 and not _WITHOUT_BFLOAT16.search(gpu_type or "")
    return "bfloat16" if has_it else "float32"
