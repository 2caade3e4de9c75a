"""Stacks of cells of equal shapes, and the decoder's layers on them, operation by operation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from klab.grid.errors import UserError
from klab.harness.policy.stacked.attention import AttentionLayout
from klab.harness.policy.stacked.config import Architecture
from klab.harness.policy.stacked.layers import embedded, gated, linear, normed, rotated

if TYPE_CHECKING:
    from klab.harness.policy.stacked.policy import StackedPolicy

Weights = dict[str, Tensor]
"""Parameters by name, with a leading cell axis or of one cell."""


def stacked_states(policy: StackedPolicy, weights: Weights, tokens: Tensor, arrangement: AttentionLayout) -> Tensor:
    """`Decoder.hidden`.

    Raises:
        UserError: sequences that are longer than the model's context.
    """
    a = policy.architecture
    heads = a.num_heads + 2 * a.num_kv_heads
    if arrangement.limit > a.context_length:
        raise UserError(f"sequences of {arrangement.limit} tokens exceed the model's context", value=a.context_length)
    turns = policy.rotary(arrangement.positions, policy.dtype, arrangement.limit)
    # one gather takes tokens to (head, lane, slot), one takes the mixed values back
    head = torch.arange(heads, device=tokens.device)[:, None]
    spread = (arrangement.slots * heads + head).view(-1)
    head, stride = head[: a.num_heads, 0], len(arrangement.slots)
    collect = (arrangement.places[:, None] + head * stride).view(-1)
    kept = arrangement.kept
    collect_kept = collect if kept is None else (arrangement.places[kept][:, None] + head * stride).view(-1)
    x = embedded(weights["embedding"], tokens)
    for layer in range(a.num_layers):
        here = kept if layer == a.num_layers - 1 else None
        back = collect if here is None else collect_kept
        inputs = (policy, x, weights, layer, arrangement, turns, spread, back, here)
        if policy.gradient_checkpointing and torch.is_grad_enabled():
            x = checkpoint(_layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            x = _layer(*inputs)
    return normed(x, weights["norm"].unsqueeze(1), a.norm_eps)


def _layer(
    policy: StackedPolicy,
    x: Tensor,
    weights: Weights,
    layer: int,
    arrangement: AttentionLayout,
    turns: tuple[Tensor, Tensor],
    spread: Tensor,
    collect: Tensor,
    kept: Tensor | None,
) -> Tensor:
    """One layer on x [A, M, hidden]; with `kept`, the new states [A, K, hidden] of those tokens alone."""
    a, A, at = policy.architecture, len(x), f"layers.{layer}."
    heads, turning = a.num_heads + 2 * a.num_kv_heads, a.num_heads + a.num_kv_heads
    h = normed(x, weights[at + "input_norm"].unsqueeze(1), a.norm_eps)
    qkv = _product(policy, h, weights, at + "qkv").view(-1, a.head_dim)
    slots = qkv.index_select(0, spread).view(heads, -1, arrangement.positions.shape[1], a.head_dim)
    turned, values = torch.split(slots, [turning, a.num_kv_heads])
    if a.qk_norm:
        turned = _head_normed(a, turned, weights[at + "q_norm"], weights[at + "k_norm"])
    queries, keys = torch.split(rotated(turned, *turns), [a.num_heads, a.num_kv_heads])
    mixed = arrangement.attend(layer, queries, keys, values).reshape(-1, a.head_dim)
    if kept is not None:
        x = x.flatten(0, 1).index_select(0, kept).view(A, -1, a.hidden_size)
    mixed = mixed.index_select(0, collect).view(A, -1, a.num_heads * a.head_dim)
    x = x + _product(policy, mixed, weights, at + "out")
    h = normed(x, weights[at + "mlp_norm"].unsqueeze(1), a.norm_eps)
    return x + _product(policy, gated(_product(policy, h, weights, at + "gate_up")), weights, at + "down")


def _product(policy: StackedPolicy, x: Tensor, weights: Weights, name: str) -> Tensor:
    out = linear(x, weights[name], weights.get(name + "_bias"))
    return out if policy.adapters is None else policy.adapters.added(out, x, weights, name)


def _head_normed(a: Architecture, turned: Tensor, query_scale: Tensor, key_scale: Tensor) -> Tensor:
    """Norm of each head's queries and keys [heads + kv_heads, A·L, S, size] with scales [A, size]."""
    A = len(query_scale)
    scale = torch.cat((query_scale.expand(a.num_heads, A, -1), key_scale.expand(a.num_kv_heads, A, -1))).unsqueeze(2)
    by_cell = turned.reshape(len(turned), A, -1, a.head_dim)
    return normed(by_cell, scale, a.norm_eps).view(turned.shape)


def equal_shapes(shapes: Sequence[Hashable]) -> list[list[int]]:
    """Indices with equal shapes together, in order of first appearance."""
    found: dict[Hashable, list[int]] = {}
    for index, shape in enumerate(shapes):
        found.setdefault(shape, []).append(index)
    return list(found.values())


def joined(slices: Sequence[Tensor]) -> Tensor:
    """Slices of some cells as one stack; a single one is not copied."""
    return slices[0].unsqueeze(0) if len(slices) == 1 else torch.stack(list(slices))


def stacked(cells: Sequence[Weights], dtype: torch.dtype, device: torch.device | str) -> Weights:
    """The parameters of single cells as leaf tensors with a leading cell axis."""
    found = {}
    for name in cells[0]:
        stack = torch.stack([cell[name].to(dtype) for cell in cells]).to(device)
        found[name] = stack.requires_grad_()
    return found
