"""Layers over the tokens of cells of unequal sizes, with hand-written gradients.

The tokens of all cells stand in one flat axis `[M, hidden]`, M = Σ M_c. What works on single tokens (norms, rotation,
gates, gathers) is done for all of them at once; products with a cell's own weights on its own stretch, and attention
matrix by matrix, with the shapes that the cell has alone. So packing changes no bit, cells need not agree in any shape,
no weights are joined, and a layer is one node of the graph.

`batched_layers.py` is the plain path: the same arithmetic, operation by operation, on cells of equal shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from klab.grid.errors import UserError
from klab.harness.policy.stacked.attention import MAX_EXPLICIT_KEYS, attention
from klab.harness.policy.stacked.grouped_ops import back_normed, back_products, products, root_mean_square, scaled, turn
from klab.harness.policy.stacked.layer_weights import LayerWeights
from klab.harness.policy.stacked.packed_layout import AttentionBatch, PackedLayout

if TYPE_CHECKING:
    from klab.harness.policy.stacked.policy import StackedPolicy


class Activations(NamedTuple):
    """What the backward pass of a layer needs: its activations, flat over cells, and the runs' attention weights."""

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
    layout: PackedLayout,
    turns: tuple[Tensor, Tensor],
    eps: float,
    last: bool,
    table: Tensor | None = None,
) -> tuple[Tensor, Activations]:
    """One layer: x [M, hidden] -> [M, hidden], or the kept tokens' [J, hidden] after the last.

    Args:
        turns: cosines and sines [M, 1, size] at the tokens' positions, see `Rotary`.
        table: [rows, 3 · heads · size], queries, keys and values of all tokens so far, to which these are added.
    """
    heads, size, stretches = layout.num_heads, turns[0].shape[-1], layout.stretches
    y1, inverse1 = root_mean_square(x, eps)
    h1 = scaled(y1, weights.input_norm, stretches)
    qkv = products(h1, weights.qkv, weights.qkv_bias, stretches)
    turn(qkv.view(-1, 3 * heads, size)[:, : 2 * heads], *turns)
    if table is not None:
        table[layout.start : layout.start + len(qkv)] = qkv
        qkv = table
    slots = qkv.view(-1, size).index_select(0, layout.spread)
    mixed_slots = x.new_empty(layout.mixed, size)
    shares = [_attend(run, slots, mixed_slots) for run in layout.runs]
    collect = layout.collect
    if last and layout.kept is not None:
        x, collect, stretches = x.index_select(0, layout.kept), layout.collect_kept, layout.kept_stretches
    mixed = mixed_slots.index_select(0, collect).view(-1, heads * size)
    x = products(mixed, weights.out, weights.out_bias, stretches).add_(x)
    y2, inverse2 = root_mean_square(x, eps)
    h2 = scaled(y2, weights.mlp_norm, stretches)
    gate_up = products(h2, weights.gate_up, weights.gate_up_bias, stretches)
    gate, up = gate_up.chunk(2, -1)
    silu = functional.silu(gate)
    act = silu * up
    x = products(act, weights.down, weights.down_bias, stretches).add_(x)
    return x, Activations(y1, inverse1, h1, slots, mixed, y2, inverse2, h2, gate_up, silu, act, tuple(shares))


def _attend(run: AttentionBatch, slots: Tensor, mixed: Tensor) -> Tensor:
    """Write a run's mixed values; its attention weights [matrices, S, K], or nothing where its lanes are long."""
    cells, heads, L, S, K = run.shape
    queries, keys, values = run.views(slots)
    room = mixed[run.mixed].view(run.matrices, S, -1)
    if K > MAX_EXPLICIT_KEYS:
        spread = (heads, cells * L, -1, slots.shape[1])
        found = attention(queries.view(spread), keys.view(spread), values.view(spread), run.bias[0, 0])
        room.copy_(found.view_as(room))
        return slots.new_empty(0)
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(run.shape)
    share = torch.add(run.bias, scores, alpha=slots.shape[1] ** -0.5).softmax(-1).view(run.matrices, S, K)
    torch.bmm(share, values, out=room)
    return share


def _attend_back(run: AttentionBatch, slots: Tensor, share: Tensor, d_mixed: Tensor, d_slots: Tensor) -> None:
    """Write the gradient of a run's queries, keys and values."""
    queries, keys, values = run.views(slots)
    d_queries, d_keys, d_values = run.views(d_slots)
    d_room = d_mixed[run.mixed].view_as(queries)
    torch.bmm(share.transpose(1, 2), d_room, out=d_values)
    d_share = torch.bmm(d_room, values.transpose(1, 2))
    d_scores = torch.ops.aten._softmax_backward_data(d_share, share, -1, share.dtype).mul_(slots.shape[1] ** -0.5)
    torch.bmm(d_scores, keys, out=d_queries)
    torch.bmm(d_scores.transpose(1, 2), queries, out=d_keys)


def backward(
    grad: Tensor,
    weights: LayerWeights,
    layout: PackedLayout,
    turns: tuple[Tensor, Tensor],
    last: bool,
    acts: Activations,
) -> tuple[Tensor, LayerWeights]:
    """Gradients of a layer's input, and of its parameters."""
    heads, size = layout.num_heads, acts.slots.shape[1]
    chosen = last and layout.kept is not None
    stretches = layout.kept_stretches if chosen else layout.stretches
    d_act, d_down, d_down_bias = back_products(grad, acts.act, weights.down, weights.down_bias, stretches)
    gate, up = acts.gate_up.chunk(2, -1)
    d_gate_up = torch.empty_like(acts.gate_up)
    d_gate, d_up = d_gate_up.chunk(2, -1)
    torch.mul(d_act, acts.silu, out=d_up)
    torch.ops.aten.silu_backward.grad_input(d_act.mul_(up), gate, grad_input=d_gate)
    d_h, d_in, d_in_bias = back_products(d_gate_up, acts.h2, weights.gate_up, weights.gate_up_bias, stretches)
    grad, d_mlp_norm = back_normed(grad, d_h, acts.y2, acts.inverse2, weights.mlp_norm, stretches)
    d_mixed, d_out, d_out_bias = back_products(grad, acts.mixed, weights.out, weights.out_bias, stretches)
    d_mixed_slots = grad.new_zeros(layout.mixed, size)
    d_mixed_slots.index_add_(0, layout.collect_kept if chosen else layout.collect, d_mixed.view(-1, size))
    room = len(layout.spread)
    d_slots = grad.new_empty(room + 1, size)
    for run, share in zip(layout.runs, acts.shares, strict=True):
        _attend_back(run, acts.slots, share, d_mixed_slots, d_slots)
    if layout.owned is not None:
        d_slots[room] = 0.0
        d_qkv = d_slots.index_select(0, layout.owned).view(-1, 3 * heads * size)
    else:
        d_qkv = grad.new_zeros(len(layout.tokens) * 3 * heads, size)
        d_qkv = d_qkv.index_add_(0, layout.spread, d_slots[:room]).view(-1, 3 * heads * size)
    turn(d_qkv.view(-1, 3 * heads, size)[:, : 2 * heads], turns[0], turns[1], back=True)
    d_h, d_qkv_weight, d_qkv_bias = back_products(d_qkv, acts.h1, weights.qkv, weights.qkv_bias, layout.stretches)
    if chosen:
        assert layout.kept is not None
        grad = grad.new_zeros(len(layout.tokens), grad.shape[1]).index_add_(0, layout.kept, grad)
    d_x, d_input_norm = back_normed(grad, d_h, acts.y1, acts.inverse1, weights.input_norm, layout.stretches)
    return d_x, LayerWeights(
        input_norm=d_input_norm,
        qkv=d_qkv_weight,
        qkv_bias=d_qkv_bias,
        out=d_out,
        out_bias=d_out_bias,
        mlp_norm=d_mlp_norm,
        gate_up=d_in,
        gate_up_bias=d_in_bias,
        down=d_down,
        down_bias=d_down_bias,
    )


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layout: PackedLayout,
        turns: tuple[Tensor, Tensor],
        eps: float,
        last: bool,
        x: Tensor,
        *weights: Tensor | None,
    ) -> Tensor:
        out, acts = forward(x, LayerWeights._make(weights), layout, turns, eps, last)
        ctx.save_for_backward(*weights, *acts[:-1], *acts.shares)
        ctx.rest = layout, turns, last
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        layout, turns, last = ctx.rest
        parameters = len(LayerWeights._fields)
        weights, saved = LayerWeights._make(ctx.saved_tensors[:parameters]), ctx.saved_tensors[parameters:]
        single = len(Activations._fields) - 1
        acts = Activations._make((*saved[:single], saved[single:]))
        d_x, gradients = backward(grad.contiguous(), weights, layout, turns, last, acts)
        return (None, None, None, None, d_x, *gradients)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: PackedLayout, eps: float, x: Tensor, scale: Tensor) -> Tensor:
        y, inverse = root_mean_square(x, eps)
        ctx.save_for_backward(y, inverse, scale)
        ctx.stretches = layout.kept_stretches
        return scaled(y, scale, layout.kept_stretches)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y, inverse, scale = ctx.saved_tensors
        d_x, d_scale = back_normed(y.new_zeros(()), grad.clone(), y, inverse, scale, ctx.stretches)
        return None, None, d_x, d_scale


def layer(
    x: Tensor,
    weights: Sequence[Tensor | None],
    layout: PackedLayout,
    turns: tuple[Tensor, Tensor],
    eps: float,
    last: bool,
) -> Tensor:
    """`forward` with gradients; a cell that takes no part has zeros."""
    out: Tensor = _Layer.apply(layout, turns, eps, last, x, *weights)  # type: ignore[no-untyped-call]
    return out


def final_norm(x: Tensor, scale: Tensor, layout: PackedLayout, eps: float) -> Tensor:
    """RMS norm of the kept tokens' states."""
    out: Tensor = _Norm.apply(layout, eps, x, scale)  # type: ignore[no-untyped-call]
    return out


def final_states(policy: StackedPolicy, layout: PackedLayout, tables: Sequence[Tensor] | None = None) -> Tensor:
    """Final, normalised hidden states [J, hidden] of a layout's kept tokens, one cell's after the other's.

    Args:
        tables: by layer, see `forward`; without gradient.

    Raises:
        UserError: sequences that exceed the model's context.
    """
    a, parameters = policy.architecture, policy.parameters
    if layout.limit > a.context_length:
        raise UserError(f"sequences of {layout.limit} tokens exceed the model's context", value=a.context_length)
    cosines, sines = policy.rotary(layout.positions, policy.dtype, layout.limit)
    turns = cosines.unsqueeze(1), sines.unsqueeze(1)
    x = layout.embedded(parameters["embedding"])
    for number in range(a.num_layers):
        weights, last = LayerWeights.of(policy, number), number == a.num_layers - 1
        if torch.is_grad_enabled():
            x = layer(x, weights, layout, turns, a.norm_eps, last)
        else:
            x, _ = forward(x, weights, layout, turns, a.norm_eps, last, None if tables is None else tables[number])
    return final_norm(x, parameters["norm"], layout, a.norm_eps)
