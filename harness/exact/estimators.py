"""A cell's gradient on each update of a tabular policy, computed by the same `objective_loss` that trains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.func import grad, vmap

from klab.grid import Objective
from klab.grid.catalogue import value_of
from klab.harness.exact.tabular import Trajectories
from klab.harness.exact.tabular_setting import Layout, Setting
from klab.harness.exact.updates import Updates
from klab.harness.objective import TokenBatch, axis_functions, objective_loss

ROWS_AT_ONCE = 32_768
"""Trajectories per call of the objective: bounds memory, and keeps its temporaries in the cache."""


def couples_groups(objective: Objective, fixed_length: bool) -> bool:
    """Whether an update's gradient depends on more than the sum of its groups' own terms."""
    return (
        objective.is_custom
        or "update" in (_statistics(objective, "advantage"), _statistics(objective, "weight"))
        or objective.entropy_share < 1.0
        or (objective.aggregation == "token_mean" and not fixed_length)
    )


def couples_trajectories(objective: Objective, fixed_length: bool) -> bool:
    """Whether an update's gradient is more than the mean of one term per trajectory."""
    return couples_groups(objective, fixed_length) or _statistics(objective, "advantage") != "trajectory"


def _statistics(objective: Objective, axis: str) -> str:
    """How much of an update the chosen value depends on: its `trajectory`, its `group` or the whole `update`."""
    if axis == "advantage" and objective.advantage == "gae" and objective.whiten == "batch":
        return "update"
    return value_of(axis, getattr(objective, axis)).statistics


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """The gradients of U updates, and the sums of their weights.

    Attributes:
        ascent: minus the gradient of the loss with respect to the policy's flattened logits.
        weight, weight_square, tokens: sums of w, w^2 and 1 over the own tokens of each update.
    """

    ascent: Float64[Tensor, "U contexts*V"]
    weight: Float64[Tensor, " U"]
    weight_square: Float64[Tensor, " U"]
    tokens: Float64[Tensor, " U"]


def update_gradients(objective: Objective, setting: Setting, updates: Updates) -> Gradients:
    """The gradient of each update, by calling the objective on its trajectories.

    Updates whose groups do not interact are concatenated into one large batch: one call of the objective, whose mean
    over trajectories is undone afterwards. Objectives with statistics over the update are mapped over updates
    (`torch.func.vmap`); the user's own functions are called update by update.
    """
    with_logits = "logits" in axis_functions(objective).needs or objective.entropy_bonus != 0.0
    if objective.is_custom:
        evaluate = _one_by_one
    elif couples_groups(objective, setting.fixed_length):
        evaluate = _mapped
    else:
        evaluate = _side_by_side
    parts = []
    for layout in _layouts(updates, setting.trajectories, setting.policy.vocabulary):
        logp_gradient, logits_gradient, weight = evaluate(
            objective, setting, layout.members, updates.group_size, with_logits
        )
        ascent = setting.parameter_gradients(layout, logp_gradient, logits_gradient).neg_()
        own = weight.flatten(1) * layout.own
        parts.append((ascent, own.sum(1), own.square().sum(1), layout.tokens))
    return Gradients(*(torch.cat(column) for column in zip(*parts, strict=True)))


@lru_cache(maxsize=8)
def _layouts(updates: Updates, trajectories: Trajectories, vocabulary: int) -> tuple[Layout, ...]:
    """The updates in pieces of at most `ROWS_AT_ONCE` trajectories."""
    pieces = torch.split(updates.members, max(1, ROWS_AT_ONCE // updates.trajectories))
    return tuple(Layout.of(members, trajectories, vocabulary) for members in pieces)


Evaluated = tuple[Float[Tensor, "*U N T"], Float[Tensor, "*U N T V"] | None, Float[Tensor, "*U N T"]]
"""Gradient of each update's loss with respect to logp and, where they are used, the logits; and the weights."""


def _side_by_side(
    objective: Objective, setting: Setting, members: Int64[Tensor, "U N"], group_size: int, with_logits: bool
) -> Evaluated:
    count, size = members.shape
    batch = setting.batch(members.flatten(), torch.arange(count * size) // group_size, with_logits)
    logp_gradient, logits_gradient, weight = loss_gradients(objective, batch)
    return (
        count * logp_gradient.view(count, size, -1),
        None if logits_gradient is None else count * logits_gradient.view(count, size, *logits_gradient.shape[1:]),
        weight.reshape(count, size, -1),
    )


def _mapped(
    objective: Objective, setting: Setting, members: Int64[Tensor, "U N"], group_size: int, with_logits: bool
) -> Evaluated:
    groups = torch.arange(members.shape[1]) // group_size

    def loss(logp: Tensor, logits: Tensor | None, chosen: Tensor) -> tuple[Tensor, Tensor]:
        batch = setting.batch(chosen, groups, with_logits)
        output = objective_loss(objective, batch.replace(logp=logp, logits=logits))
        return output.loss, output.token_stats.weight

    logp, logits = setting.logp[members], setting.logits[members] if with_logits else None
    wanted = (0, 1) if with_logits else 0
    mapped = vmap(grad(loss, argnums=wanted, has_aux=True), in_dims=(0, 0 if with_logits else None, 0))
    gradients, weight = mapped(logp, logits, members)
    return (*gradients, weight) if with_logits else (gradients, None, weight)


def _one_by_one(
    objective: Objective, setting: Setting, members: Int64[Tensor, "U N"], group_size: int, with_logits: bool
) -> Evaluated:
    groups = torch.arange(members.shape[1]) // group_size
    found = [loss_gradients(objective, setting.batch(row, groups, with_logits)) for row in members]
    logits_gradients = [logits for _, logits, _ in found if logits is not None]
    return (
        torch.stack([logp for logp, _, _ in found]),
        torch.stack(logits_gradients) if logits_gradients else None,
        torch.stack([weight for _, _, weight in found]),
    )


def loss_gradients(objective: Objective, batch: TokenBatch) -> Evaluated:
    """Gradient of the loss with respect to logp and, where given, the logits; and the weights."""
    leaves = [batch.logp.detach().requires_grad_()]
    if batch.logits is not None:
        leaves.append(batch.logits.detach().requires_grad_())
    with torch.enable_grad():
        output = objective_loss(objective, batch.replace(logp=leaves[0], logits=leaves[1] if leaves[1:] else None))
    if output.loss.requires_grad:
        gradients = torch.autograd.grad(output.loss, leaves, allow_unused=True, materialize_grads=True)
    else:
        gradients = tuple(torch.zeros_like(leaf) for leaf in leaves)
    return gradients[0], gradients[1] if leaves[1:] else None, output.token_stats.weight
