"""The architecture of a Llama, Qwen2 or Qwen3 model, read from its transformers configuration without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from klab.grid.errors import UserError

FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes and options of a decoder-only transformer.

    Attributes:
        qkv_bias, out_bias, mlp_bias: whether those projections have a bias.
        qk_norm: RMS norm on each head's queries and keys (Qwen3).
        tied: whether the output layer is the embedding.
        context_length: the longest sequence that the rotary embedding was made for.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    initializer_range: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    context_length: int

    @classmethod
    def from_config(cls, config: Any) -> Architecture:
        """Read a transformers configuration.

        Raises:
            UserError: another family, an activation other than SiLU, or sliding-window attention.
        """
        family = str(config.model_type)
        if family not in FAMILIES:
            raise UserError("not in the stacked engine", key="model_type", value=family, allowed=FAMILIES)
        if config.hidden_act != "silu":
            raise UserError("unsupported activation", key="hidden_act", value=config.hidden_act, allowed=("silu",))
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise UserError("sliding-window attention is not supported", key="use_sliding_window", value=True)
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            family=family,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            norm_eps=config.rms_norm_eps,
            initializer_range=config.initializer_range,
            qkv_bias=bias or family == "qwen2",
            out_bias=bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=family == "qwen3",
            tied=bool(config.tie_word_embeddings),
            context_length=config.max_position_embeddings,
        )

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of one cell; matrices are [in, out], the transpose of transformers'."""
        wide = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        found: dict[str, tuple[int, ...]] = {"embedding": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            at = f"layers.{layer}."
            found[at + "input_norm"] = (self.hidden_size,)
            found[at + "qkv"] = (self.hidden_size, wide)
            if self.qkv_bias:
                found[at + "qkv_bias"] = (wide,)
            if self.qk_norm:
                found[at + "q_norm"] = (self.head_dim,)
                found[at + "k_norm"] = (self.head_dim,)
            found[at + "out"] = (self.num_heads * self.head_dim, self.hidden_size)
            if self.out_bias:
                found[at + "out_bias"] = (self.hidden_size,)
            found[at + "mlp_norm"] = (self.hidden_size,)
            found[at + "gate_up"] = (self.hidden_size, 2 * self.intermediate_size)
            if self.mlp_bias:
                found[at + "gate_up_bias"] = (2 * self.intermediate_size,)
            found[at + "down"] = (self.intermediate_size, self.hidden_size)
            if self.mlp_bias:
                found[at + "down_bias"] = (self.hidden_size,)
        found["norm"] = (self.hidden_size,)
        if not self.tied:
            found["head"] = (self.hidden_size, self.vocab_size)
        return found

    def projection_sizes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of every linear layer of a decoder layer, under the names that transformers gives them."""
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden_size, wide),
            "k_proj": (self.hidden_size, narrow),
            "v_proj": (self.hidden_size, narrow),
            "o_proj": (wide, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }
