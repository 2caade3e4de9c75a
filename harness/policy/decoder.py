"""The stacked decoder: C models of one architecture (Llama, Qwen2, Qwen3) whose weights carry a leading cell axis.

Everything but attention works on single tokens, so tokens stand in one flat axis without padding, `[C, M, hidden]`; which token
sees which is the business of the arrangement that a forward pass is given (`harness.policy.attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from grid.mistake import Mistake
from harness.policy.architecture import Architecture, Rotary
from harness.policy.attention import Arrangement
from harness.policy.checkpoint import read_config, read_tokenizer, read_weights, write_checkpoint

Weights = dict[str, Tensor]


class Decoder:
    """C stacked policies.

    Attributes:
        cells: C.
        config: the transformers configuration they share.
        tokenizer: theirs.
        parameters: name -> [C, …], leaf tensors; matrices are [C, in, out].
    """

    def __init__(self, config: Any, tokenizer: PreTrainedTokenizerFast, parameters: Weights) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.architecture = Architecture.of(config)
        self.rotary = Rotary(config, self.architecture.head_size)
        self.parameters = parameters
        self.cells = len(parameters["embedding"])

    @classmethod
    def random(
        cls,
        config: Any,
        tokenizer: PreTrainedTokenizerFast,
        seeds: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Decoder:
        """One freshly initialised cell per seed: normal(0, initializer_range) matrices, unit norms, zero biases."""
        architecture = Architecture.of(config)
        cells = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            cell = {}
            for name, shape in architecture.shapes().items():
                if name.endswith("norm"):
                    cell[name] = torch.ones(shape)
                elif name.endswith("bias"):
                    cell[name] = torch.zeros(shape)
                else:
                    cell[name] = torch.randn(shape, generator=generator) * architecture.initializer_range
            cells.append(cell)
        return cls(config, tokenizer, _stacked(cells, dtype, device))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        cells: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Decoder:
        """`cells` copies of a Hugging Face checkpoint (a folder or a hub id).

        Raises:
            Mistake: no such checkpoint, an architecture outside the three families, or a tokenizer without an end token.
        """
        config = read_config(folder)
        architecture = Architecture.of(config)
        tokenizer = read_tokenizer(folder)
        if tokenizer.eos_token_id is None:
            raise Mistake("the tokenizer has no end token", file=folder, hint="Set eos_token in its configuration.")
        cell = read_weights(folder, architecture)
        return cls(config, tokenizer, _stacked([cell] * cells, dtype, device))

    @property
    def vocabulary(self) -> int:
        return self.architecture.vocabulary

    @property
    def device(self) -> torch.device:
        return self.parameters["embedding"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters["embedding"].dtype

    def save_pretrained(self, folder: str | Path, cell: int = 0) -> None:
        """One cell as an ordinary Hugging Face checkpoint folder: config.json, model.safetensors, tokenizer."""
        weights = {name: value[cell].detach().cpu() for name, value in self.parameters.items()}
        write_checkpoint(Path(folder), self.config, self.tokenizer, self.architecture, weights)

    def save(self, path: str | Path, cell: int) -> None:
        """`save_pretrained` under the name of the policy interface."""
        self.save_pretrained(path, cell)

    @torch.no_grad()
    def load(self, path: str | Path, cell: int) -> None:
        """Put a checkpoint's weights into one cell.

        Raises:
            Mistake: the checkpoint has another architecture.
        """
        architecture = Architecture.of(read_config(path))
        if architecture.shapes() != self.architecture.shapes():
            raise Mistake("the checkpoint has another architecture than the policy it is loaded into", file=path)
        for name, value in read_weights(path, architecture).items():
            self.parameters[name][cell].copy_(value)

    def frozen(self) -> Decoder:
        """A copy that needs no gradient and shares no memory with this policy: the reference."""
        copies = {name: value.detach().clone() for name, value in self.parameters.items()}
        return Decoder(self.config, self.tokenizer, copies)

    def weights(self, cells: Sequence[int]) -> Weights:
        """The weights of some cells, stacked: the parameters themselves where all are asked for, else joined slices."""
        if list(cells) == list(range(self.cells)):
            return self.parameters
        if len(cells) == 1:
            return {name: value[cells[0]].unsqueeze(0) for name, value in self.parameters.items()}
        return {name: torch.stack([value[c] for c in cells]) for name, value in self.parameters.items()}

    def hidden(self, weights: Weights, tokens: Tensor, arrangement: Arrangement) -> Tensor:
        """Final, normalised hidden states [A, K, hidden] of the kept tokens.

        Args:
            weights: of A cells.
            tokens: ids [A, M].
            arrangement: who sees whom; also which tokens' states are kept after the last layer (K ≤ M).
        """
        a = self.architecture
        A, M = tokens.shape
        limit = arrangement.limit
        if limit > a.context:
            raise Mistake(f"sequences of {limit} tokens exceed the model's context", value=a.context)
        cosines, sines = self.rotary(arrangement.positions, self.dtype, limit)
        x = _embedded(weights["embedding"], tokens)
        for layer in range(a.layers):
            at = f"layers.{layer}."
            last = layer == a.layers - 1
            h = _normed(x, weights[at + "input_norm"], a.norm_eps)
            qkv = _linear(h, weights[at + "qkv"], weights.get(at + "qkv_bias"))
            slots = arrangement.spread(qkv)  # [L, S, (heads + 2 kv_heads) * head_size]
            L, S = slots.shape[:2]
            slots = slots.view(L, S, a.heads + 2 * a.kv_heads, a.head_size)
            turned, values = slots.split((a.heads + a.kv_heads, a.kv_heads), 2)
            if a.qk_norm:
                scale = torch.cat(
                    (
                        weights[at + "q_norm"][:, None].expand(A, a.heads, a.head_size),
                        weights[at + "k_norm"][:, None].expand(A, a.kv_heads, a.head_size),
                    ),
                    1,
                )
                shape = turned.shape
                turned = _normed(turned.reshape(A, -1, *shape[2:]), scale, a.norm_eps).view(shape)
            turned = _rotated(turned, cosines, sines)
            queries, keys = turned.split((a.heads, a.kv_heads), 2)
            mixed = arrangement.attend(layer, queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
            mixed = arrangement.collect(mixed.transpose(1, 2).reshape(L, S, a.heads * a.head_size), A, last)
            if last:
                x = arrangement.kept(x)
            x = x + _linear(mixed, weights[at + "out"], weights.get(at + "out_bias"))
            h = _normed(x, weights[at + "mlp_norm"], a.norm_eps)
            gate, up = _linear(h, weights[at + "gate_up"], weights.get(at + "gate_up_bias")).chunk(2, -1)
            x = x + _linear(F.silu(gate) * up, weights[at + "down"], weights.get(at + "down_bias"))
        return _normed(x, weights["norm"], a.norm_eps)

    def logits(self, weights: Weights, hidden: Tensor) -> Tensor:
        """[A, K, V] of hidden states [A, K, hidden]."""
        if self.architecture.tied:
            return torch.bmm(hidden, weights["embedding"].transpose(1, 2))
        return torch.bmm(hidden, weights["head"])


def _stacked(cells: Sequence[Weights], dtype: torch.dtype, device: torch.device | str) -> Weights:
    found = {}
    for name in cells[0]:
        stack = torch.stack([cell[name].to(dtype) for cell in cells]).to(device)
        found[name] = stack.requires_grad_()
    return found


def _embedded(table: Tensor, tokens: Tensor) -> Tensor:
    """Rows of each cell's table [A, V, hidden] at tokens [A, M]."""
    A, V, D = table.shape
    offsets = torch.arange(A, device=tokens.device)[:, None] * V
    return F.embedding((tokens + offsets).view(-1), table.reshape(A * V, D)).view(A, -1, D)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)


def _normed(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis of [A, M, …], scaled by [A, …]; at least in float32, like transformers."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return scale.unsqueeze(1) * wide.to(x.dtype)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of [L, S, heads, size] with tables [L, S, size / 2] (L may be 1)."""
    c, s = cosines.unsqueeze(2), sines.unsqueeze(2)
    first, second = x.chunk(2, -1)
    return torch.cat((first * c - second * s, second * c + first * s), -1)

