"""Layers over the tokens of cells of unequal sizes, with hand-written gradients.

The tokens of all cells stand in one flat axis `[M, hidden]`, M = Σ M_c. What works on single tokens (norms, rotation,
gates, gathers) is done for all of them at once; products with a cell's own weights, and its attention, are done cell
by cell on its own stretch, with the shapes that it has alone. So packing changes no bit, cells need not agree in any
shape, no weights are joined, and a layer is one node of the graph.

`harness.policy.stacked` is the plain path: the same arithmetic, operation by operation, on cells of equal shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from grid.mistake import Mistake
from harness.policy.attention import EXPLICIT_SLOTS, attention
from harness.policy.layer_weights import NAMES, LayerWeights, layers_of, stacked_layer
from harness.policy.layout import Layout
from harness.policy.stretches import (
    added_products,
    attention_weights,
    back_normed,
    back_products,
    products,
    room_for_gradient,
    root_mean_square,
    scaled,
    turn,
)

if TYPE_CHECKING:
    from harness.policy.decoder import Decoder

Cached = tuple[Tensor, Tensor]
"""Keys and values [heads · lanes, slots, head_size] of one cell."""


class Activations(NamedTuple):
    """What the backward pass of a layer needs: its activations, flat over cells."""

    y1: Tensor
    inverse1: Tensor
    h1: Tensor
    slots: Tensor
    mixed: Tensor
    y2: Tensor
    inverse2: Tensor
    h2: Tensor
    gate_up: Tensor
    silu: Tensor
    act: Tensor
    shares: tuple[Tensor, ...]


def forward(
    x: Tensor,
    weights: LayerWeights,
    layout: Layout,
    turns: tuple[Tensor, Tensor],
    eps: float,
    last: bool,
    cached: list[Cached | None] | None = None,
) -> tuple[Tensor, Activations]:
    """One layer: x [M, hidden] -> [M, hidden], or the kept tokens' [K, hidden] after the last.

    Args:
        turns: cosines and sines [M, 1, size] at the tokens' positions, see `Rotary`.
        cached: by cell, the keys and values of earlier passes; replaced by all keys and values so far.
    """
    heads, size, sizes = layout.heads, turns[0].shape[-1], layout.sizes
    y1, inverse1 = root_mean_square(x, eps)
    h1 = scaled(y1, weights.input_norm, sizes)
    qkv = products(h1, weights.qkv, weights.qkv_bias, sizes)
    turn(qkv.view(-1, 3 * heads, size)[:, : 2 * heads], *turns)
    slots = qkv.view(-1, size).index_select(0, layout.spread)
    mixed_slots = x.new_empty(heads * sum(layout.slots), size)
    shares: list[Tensor] = []
    chunks = zip(
        layout.lanes,
        slots.split_with_sizes([3 * heads * n for n in layout.slots]),
        mixed_slots.split_with_sizes([heads * n for n in layout.slots]),
        strict=True,
    )
    for i, (lanes, chunk, mixed_chunk) in enumerate(chunks):
        L, S = lanes.slots.shape
        queries, keys, values = chunk.view(3, heads * L, S, size).unbind(0)
        if cached is not None:
            before = cached[i]
            if before is not None:
                keys, values = torch.cat((before[0], keys), 1), torch.cat((before[1], values), 1)
            cached[i] = (keys, values)
        room = mixed_chunk.view(heads * L, S, size)
        if cached is not None and keys.shape[1] > EXPLICIT_SLOTS:
            spread = (heads, L, -1, size)
            room.copy_(
                attention(queries.view(spread), keys.view(spread), values.view(spread), lanes.bias).view_as(room)
            )
            continue
        share = attention_weights(queries, keys, lanes.bias, heads)
        torch.bmm(share, values, out=room)
        shares.append(share)
    collect = layout.collect
    if last and layout.kept is not None:
        x, collect, sizes = x.index_select(0, layout.kept), layout.collect_kept, layout.kept_sizes
    mixed = mixed_slots.index_select(0, collect).view(-1, heads * size)
    x = added_products(x, mixed, weights.out, weights.out_bias, sizes)
    y2, inverse2 = root_mean_square(x, eps)
    h2 = scaled(y2, weights.mlp_norm, sizes)
    gate_up = products(h2, weights.gate_up, weights.gate_up_bias, sizes)
    gate, up = gate_up.chunk(2, -1)
    silu = functional.silu(gate)
    act = silu * up
    x = added_products(x, act, weights.down, weights.down_bias, sizes)
    return x, Activations(y1, inverse1, h1, slots, mixed, y2, inverse2, h2, gate_up, silu, act, tuple(shares))


def backward(
    grad: Tensor,
    weights: LayerWeights,
    layout: Layout,
    turns: tuple[Tensor, Tensor],
    last: bool,
    acts: Activations,
    into: LayerWeights,
) -> Tensor:
    """Gradient of a layer's input; the weights' gradients are written into `into`."""
    heads, size = layout.heads, acts.slots.shape[1]
    chosen = last and layout.kept is not None
    sizes = layout.kept_sizes if chosen else layout.sizes
    d_act = back_products(grad, acts.act, weights.down, sizes, into.down, into.down_bias)
    gate, up = acts.gate_up.chunk(2, -1)
    d_gate_up = torch.empty_like(acts.gate_up)
    d_gate, d_up = d_gate_up.chunk(2, -1)
    torch.mul(d_act, acts.silu, out=d_up)
    torch.ops.aten.silu_backward.grad_input(d_act.mul_(up), gate, grad_input=d_gate)
    d_h = back_products(d_gate_up, acts.h2, weights.gate_up, sizes, into.gate_up, into.gate_up_bias)
    grad = back_normed(grad, d_h, acts.y2, acts.inverse2, weights.mlp_norm, into.mlp_norm, sizes)
    d_mixed = back_products(grad, acts.mixed, weights.out, sizes, into.out, into.out_bias)
    d_mixed_slots = grad.new_zeros(heads * sum(layout.slots), size)
    collect = layout.collect_kept if chosen else layout.collect
    d_mixed_slots.index_add_(0, collect, d_mixed.view(-1, size))
    room = 3 * heads * sum(layout.slots)
    d_slots = grad.new_empty(room + 1, size)
    chunks = zip(
        layout.lanes,
        acts.slots.split_with_sizes([3 * heads * n for n in layout.slots]),
        acts.shares,
        d_mixed_slots.split_with_sizes([heads * n for n in layout.slots]),
        d_slots[:room].split_with_sizes([3 * heads * n for n in layout.slots]),
        strict=True,
    )
    scale = size**-0.5
    for lanes, chunk, share, d_mix, d_chunk in chunks:
        L, S = lanes.slots.shape
        queries, keys, values = chunk.view(3, heads * L, S, size).unbind(0)
        d_queries, d_keys, d_values = d_chunk.view(3, heads * L, S, size).unbind(0)
        d_mix = d_mix.view(heads * L, S, size)
        torch.bmm(share.transpose(1, 2), d_mix, out=d_values)
        d_share = torch.bmm(d_mix, values.transpose(1, 2))
        d_scores = torch.ops.aten._softmax_backward_data(d_share, share, -1, share.dtype).mul_(scale)
        torch.bmm(d_scores, keys, out=d_queries)
        torch.bmm(d_scores.transpose(1, 2), queries, out=d_keys)
    if layout.owned is not None:
        d_slots[room] = 0.0
        d_qkv = d_slots.index_select(0, layout.owned).view(-1, 3 * heads * size)
    else:
        d_qkv = grad.new_zeros(sum(layout.sizes) * 3 * heads, size)
        d_qkv = d_qkv.index_add_(0, layout.spread, d_slots[:room]).view(-1, 3 * heads * size)
    turn(d_qkv.view(-1, 3 * heads, size)[:, : 2 * heads], turns[0], turns[1], back=True)
    d_h = back_products(d_qkv, acts.h1, weights.qkv, layout.sizes, into.qkv, into.qkv_bias)
    if chosen:
        assert layout.kept is not None
        grad = grad.new_zeros(sum(layout.sizes), grad.shape[1]).index_add_(0, layout.kept, grad)
    return back_normed(grad, d_h, acts.y1, acts.inverse1, weights.input_norm, into.input_norm, layout.sizes)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        turns: tuple[Tensor, Tensor],
        eps: float,
        last: bool,
        x: Tensor,
        *stacked: Tensor | None,
    ) -> Tensor:
        out, acts = forward(x, LayerWeights.of(stacked, layout.cells), layout, turns, eps, last)
        ctx.save_for_backward(*stacked, *acts[:-1], *acts.shares)
        ctx.rest = layout, turns, last
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        layout, turns, last = ctx.rest
        stacked, saved = ctx.saved_tensors[: len(NAMES)], ctx.saved_tensors[len(NAMES) :]
        single = len(Activations._fields) - 1
        acts = Activations._make((*saved[:single], saved[single:]))
        gradients = [None if value is None else room_for_gradient(value, len(layout.cells)) for value in stacked]
        into = LayerWeights.of(gradients, layout.cells)
        d_x = backward(grad.contiguous(), LayerWeights.of(stacked, layout.cells), layout, turns, last, acts, into)
        return (None, None, None, None, d_x, *gradients)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: Layout, eps: float, x: Tensor, scale: Tensor) -> Tensor:
        y, inverse = root_mean_square(x, eps)
        scales = [scale[c] for c in layout.cells]
        ctx.save_for_backward(y, inverse, scale)
        ctx.layout = layout
        return scaled(y, scales, layout.kept_sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y, inverse, scale = ctx.saved_tensors
        d_scale = room_for_gradient(scale, len(ctx.layout.cells))
        cells, sizes = ctx.layout.cells, ctx.layout.kept_sizes
        scales, into = [scale[c] for c in cells], [d_scale[c] for c in cells]
        d_x = back_normed(torch.zeros((), dtype=y.dtype), grad.clone(), y, inverse, scales, into, sizes)
        return None, None, d_x, d_scale


def layer(
    x: Tensor, stacked: Sequence[Tensor | None], layout: Layout, turns: tuple[Tensor, Tensor], eps: float, last: bool
) -> Tensor:
    """`forward` with gradients; then all cells of the stack must take part."""
    out: Tensor = _Layer.apply(layout, turns, eps, last, x, *stacked)  # type: ignore[no-untyped-call]
    return out


def final_norm(x: Tensor, scale: Tensor, layout: Layout, eps: float) -> Tensor:
    """RMS norm of the kept tokens' states."""
    out: Tensor = _Norm.apply(layout, eps, x, scale)  # type: ignore[no-untyped-call]
    return out


def final_states(
    policy: Decoder,
    layout: Layout,
    cached: Sequence[list[Cached | None]] | None = None,
    weights: Sequence[LayerWeights] | None = None,
) -> Tensor:
    """Final, normalised hidden states [K, hidden] of a layout's kept tokens, one cell's after the other's.

    Args:
        cached: by layer and cell, see `forward`; without gradient.
        weights: what `layers_of` gives for the layout's cells, if that is known already.

    Raises:
        Mistake: sequences that exceed the model's context.
    """
    a, parameters = policy.architecture, policy.parameters
    if layout.limit > a.context:
        raise Mistake(f"sequences of {layout.limit} tokens exceed the model's context", value=a.context)
    cosines, sines = policy.rotary(layout.positions, policy.dtype, layout.limit)
    turns = cosines.unsqueeze(1), sines.unsqueeze(1)
    x = functional.embedding(layout.rows(a.vocabulary), parameters["embedding"].flatten(0, 1))
    graph = torch.is_grad_enabled()
    if not graph and weights is None:
        weights = layers_of(policy, layout.cells)
    for number in range(a.layers):
        last = number == a.layers - 1
        if graph or weights is None:
            x = layer(x, stacked_layer(policy, number), layout, turns, a.norm_eps, last)
        else:
            x, _ = forward(
                x, weights[number], layout, turns, a.norm_eps, last, None if cached is None else cached[number]
            )
    return final_norm(x, parameters["norm"], layout, a.norm_eps)
