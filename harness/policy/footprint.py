"""Memory that passes through a model take beside its weights, from its sizes: activations, logits, keys and values.

Activations are what the forward pass keeps for the backward pass. Per token and layer they are a sum of the layer's
widths, with whole factors that were found by counting the tensors that each engine keeps; `test_footprint.py` counts
them again. Attention is taken to keep no scores, as fused kernels do. Temporaries of a few rows are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_LOGITS = {"cpu": 2**24, "cuda": 2**28}
"""Logits held at once, by type of device, each in two or three tensors of 4 or 8 bytes."""

SAMPLING_FACTOR = 16
"""Tokens that may be sampled at once for each that may be trained on: sampling keeps only keys and values, a backward
pass needs every layer's activations."""

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

_LOGITS_TENSORS = {"stacked": 3, "transformers": 4}
"""Tensors of float32 or wider that an engine holds of each logit of a chunk at once."""

Factors = tuple[int, int, int, int, int]
"""Numbers that are kept per token and layer: multiples of the widths hidden, queries, keys, feed-forward and heads."""

_FACTORS: Mapping[tuple[str, bool, bool], Factors] = {
    ("stacked", True, False): (8, 6, 4, 4, 4),
    ("stacked", False, False): (4, 6, 4, 4, 2),
    ("stacked", True, True): (8, 6, 4, 4, 4),
    ("stacked", False, True): (4, 6, 4, 4, 2),
    ("transformers", True, False): (8, 2, 2, 4, 2),
    ("transformers", False, False): (6, 2, 2, 4, 1),
    ("transformers", True, True): (14, 4, 2, 5, 2),
    ("transformers", False, True): (4, 2, 2, 4, 1),
}
"""By engine, whether the model has 16 bits, and whether adapters are trained."""

_ADAPTED = {True: 14, False: 7}
"""Numbers that PEFT's adapters on seven projections keep per token, layer and rank, beside 16 bits or not."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """The sizes of a decoder that its passes' memory depends on.

    Attributes:
        engine: `stacked` or `transformers`.
        layers, hidden, queries, keys, intermediate, heads, vocabulary: of the model; `queries` and `keys` are widths
            over all heads.
        width: bytes of a number.
        rank: of the adapters; 0 without.
        recomputes: only the layers' inputs are kept (`policy.gradient_checkpointing`).
    """

    engine: str
    layers: int
    hidden: int
    queries: int
    keys: int
    intermediate: int
    heads: int
    vocabulary: int
    width: int
    rank: int = 0
    recomputes: bool = False

    @classmethod
    def of(cls, section: Any, config: Any, engine: str) -> Footprint | None:
        """From the grid's policy section and a model's transformers configuration; None where that lacks a size, as of
        models without attention."""
        text = config.get_text_config()
        hidden, heads, layers = (
            getattr(text, name, None) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
        )
        if not hidden or not heads or not layers:
            return None
        head = getattr(text, "head_dim", None) or hidden // heads
        found = (getattr(text, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
        inner = next((size for size in found if isinstance(size, int)), 4 * hidden)
        return cls(
            engine,
            layers,
            hidden,
            heads * head,
            (getattr(text, "num_key_value_heads", None) or heads) * head,
            inner,
            heads,
            text.vocab_size,
            _BYTES[section.dtype],
            0 if section.lora is None else section.lora.rank,
            section.gradient_checkpointing,
        )

    @property
    def per_layer(self) -> int:
        """Bytes that one layer keeps of one token."""
        narrow, adapted = self.width < 4, self.rank > 0
        widths = (self.hidden, self.queries, self.keys, self.intermediate, self.heads)
        kept = sum(a * b for a, b in zip(_FACTORS[self.engine, narrow, adapted], widths, strict=True))
        if adapted and self.engine == "transformers":
            kept += _ADAPTED[narrow] * self.rank
        return kept * self.width

    @property
    def per_token(self) -> int:
        """Bytes of activations that grow with every further token."""
        return self.layers * (self.hidden * self.width if self.recomputes else self.per_layer)

    def activations(self, tokens: int) -> int:
        """Bytes at the peak of an update with so many tokens in a micro-batch, prompts included. Layers that are
        computed again are there one at a time."""
        again = self.per_layer if self.recomputes else 0
        return tokens * (self.per_token + again)

    def logits(self, rows: int, device: str) -> int:
        """Bytes for the logits of so many tokens, which are computed in chunks where they are too many."""
        at_once = min(rows * self.vocabulary, MAX_LOGITS.get(device, MAX_LOGITS["cuda"]))
        return max(4, self.width) * _LOGITS_TENSORS[self.engine] * at_once

    def cache(self, tokens: int) -> int:
        """Bytes for the keys and values of so many tokens."""
        return 2 * self.layers * self.keys * self.width * tokens

    def tokens_within(self, size: int) -> int:
        """How many tokens' activations fit into so many bytes; at least 1."""
        return max(1, size // (self.per_token + (self.per_layer if self.recomputes else 0)))


@dataclass(frozen=True, slots=True)
class Workload:
    """How many tokens go through a model at once where every completion takes its whole budget.

    Attributes:
        prompt, new: tokens of the longest prompt and of a completion.
        rows: trajectories of a micro-batch, in groups of `group`; as the settings ask for, before any token budget.
        sampled: trajectories that are drawn at once.
        token_budget: the setting, or the default that the device's memory gives.
    """

    prompt: int
    new: int
    rows: int
    group: int
    sampled: int
    token_budget: int | None = None

    def micro_batch(self, engine: str, single: bool = False) -> tuple[int, int]:
        """Tokens that go through the layers, and own tokens, of a micro-batch, or of the least: a single trajectory.

        The stacked engine forwards a prompt once for the completions of its group, transformers for each of them.
        """
        rows = 1 if single else self.rows
        if self.token_budget is not None and not single:
            group = self.prompt + min(self.group, rows) * self.new
            rows = min(rows, max(1, int(self.token_budget / group * min(self.group, rows))))
        prompts = rows if engine == "transformers" else -(-rows // self.group)
        return prompts * self.prompt + rows * self.new, rows * self.new

    def drawn(self) -> int:
        """Tokens whose keys and values are held at once while sampling."""
        length = self.prompt + self.new
        most = self.sampled if self.token_budget is None else SAMPLING_FACTOR * self.token_budget // length
        return max(1, min(self.sampled, most)) * length
