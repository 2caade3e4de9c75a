"""klab's own `objective_loss` on a tabular policy, for claims about code instead of formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from klab.grid import Objective
from klab.harness.claims.instances import Setting
from klab.harness.exact.tabular import TabularPolicy
from klab.harness.objective import TokenBatch, objective_loss


def batch_of(
    setting: Setting, reward: Tensor, rows: Tensor | None = None, groups: Tensor | None = None
) -> tuple[TokenBatch, Tensor]:
    """The batch of some trajectories (by default all, each its own group) and the leaf that carries the gradient.

    Args:
        setting: the three policies.
        reward: of every trajectory, `[M]`.
        rows: indices of the trajectories in the batch, `[N]`.
        groups: the prompt of each, `[N]`.
    """
    rows = torch.arange(len(reward)) if rows is None else rows
    groups = torch.arange(len(rows)) if groups is None else groups
    logits = setting.policy.logits.detach().clone().requires_grad_()
    policy = TabularPolicy(logits, setting.policy.end)
    every = policy.trajectories
    batch = TokenBatch(
        policy.token_logp()[rows],
        setting.behaviour.token_logp().detach()[rows],
        setting.reference.token_logp().detach()[rows],
        mask=every.mask[rows],
        rewards=reward[rows],
        groups=groups,
        max_new_tokens=policy.horizon,
        logits=policy.token_logits()[rows],
        logits_reference=setting.reference.token_logits().detach()[rows],
    )
    return batch, logits


def loss_gradient(
    objective: Objective, setting: Setting, reward: Tensor, rows: Tensor | None = None, groups: Tensor | None = None
) -> tuple[float, Tensor]:
    """The harness's loss on the batch and its gradient with respect to the logits, flat `[D]`."""
    batch, logits = batch_of(setting, reward, rows, groups)
    loss = objective_loss(objective, batch).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    return float(loss.detach()), gradient.flatten()
