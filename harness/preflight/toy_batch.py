"""An update small enough to try the user's own axis values on."""

from __future__ import annotations

import torch
from torch import Tensor

from klab.grid import Objective, UserError
from klab.harness.objective import Divergence, Placement, TokenBatch, axis_functions, objective_loss
from klab.harness.objective.functions import divergence_of
from klab.harness.objective.inputs import View
from klab.harness.objective.kl import entropy

_N, _T, _V = 4, 3, 5


def try_objective(objective: Objective, axis: str | None = None) -> None:
    """Compute loss and gradient of two groups of two trajectories.

    Args:
        axis: the axis whose value is also called alone, to look at what it returns.

    Raises:
        UserError: a value that cannot be loaded or called, or that returns something of another kind or shape.
    """
    batch = toy_batch()
    functions = axis_functions(objective)
    if axis is not None:
        _check_kind(objective, axis, batch)
    if axis == "divergence":
        made = divergence_of(objective)
        if not isinstance(made, Divergence):
            kind = type(made).__name__
            raise UserError(
                f"returns a {kind}, not a klab.harness.objective.Divergence", key=axis, value=objective.divergence
            )
    if not isinstance(functions.placement, Placement):
        kind = type(functions.placement).__name__
        raise UserError(
            f"returns a {kind}, not a klab.harness.objective.Placement", key="placement", value=objective.placement
        )
    loss = objective_loss(objective, batch).loss
    if loss.requires_grad:
        torch.autograd.backward(loss)


def toy_batch() -> TokenBatch:
    """Random log-probabilities; one trajectory is shorter, rewards differ within the groups."""
    generator = torch.Generator().manual_seed(0)
    logits, reference, behaviour = (torch.randn(_N, _T, _V, generator=generator) for _ in range(3))
    logits.requires_grad_()
    tokens = torch.arange(_N * _T).remainder(_V).view(_N, _T, 1)

    def logp(values: Tensor) -> Tensor:
        return values.log_softmax(-1).gather(-1, tokens)[..., 0]

    mask = torch.ones(_N, _T, dtype=torch.bool)
    mask[1, 2] = False
    return TokenBatch(
        logp=logp(logits),
        logp_behaviour=logp(behaviour),
        logp_reference=logp(reference),
        mask=mask,
        rewards=torch.tensor([1.0, 0.0, 0.5, 1.0]),
        groups=torch.tensor([0, 0, 1, 1]),
        max_new_tokens=_T,
        logits=logits,
        logits_reference=reference,
        greedy_rewards=torch.tensor([0.5, 0.5, 1.0, 1.0]),
        values=torch.zeros(_N, _T),
        entropy=entropy(logits.detach()),
    )


def _check_kind(objective: Objective, axis: str, batch: TokenBatch) -> None:
    """Raises UserError where a value of these axes does not return a tensor of the shape of the tokens."""
    functions = axis_functions(objective)
    ratio = (batch.logp - batch.logp_behaviour).detach()
    advantage = torch.ones_like(ratio)
    inputs = {"ratio": (ratio, batch.mask), "weight": (ratio.exp(), advantage), "path": (ratio, ratio)}
    if axis not in inputs:
        return
    view = View(batch, batch.mask, advantage=advantage, ratio=ratio.exp(), groups=batch.grouping())
    asked = view.inputs(functions.asks.get(axis, ()))
    if axis == "weight" and functions.solver is not None:
        asked |= functions.solver(ratio, batch.mask, **view.inputs(functions.asks["solver"]))
    value = getattr(functions, axis)(*inputs[axis], **asked)
    if not isinstance(value, Tensor) or value.shape != ratio.shape:
        kind = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(
            f"returns {kind}, not a tensor of the shape of the tokens, [N, T] = [{_N}, {_T}]",
            key=axis,
            value=getattr(objective, axis),
        )
