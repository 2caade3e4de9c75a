"""Advantages that look at more of a group than its mean and standard deviation: what succeeded, the best, each term."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from klab.harness.objective.advantage import (
    ADVANTAGES,
    Returns,
    group_center,
    leave_one_out,
    standardised,
    whitened,
)
from klab.harness.objective.masking import left_align, lengths, masked, undo_left_align


@ADVANTAGES.register("leave_one_out_norm")
def leave_one_out_norm(returns: Returns, *, std: str, eps: float) -> Float[Tensor, "N T"]:
    """`leave_one_out` divided by (std_G + eps); 0 where std_G is 0 (the default of NeMo-RL)."""
    _, spread = returns.group_mean_and_std(returns.trajectory_returns, returns.has_tokens, std)
    return standardised(leave_one_out(returns), spread, eps)


@ADVANTAGES.register("group_success")
def group_success(returns: Returns) -> Float[Tensor, "N T"]:
    """(r − mean_G)/mean_G, and 0 where mean_G ≤ 0 (MaxRL, Tajwar et al. 2026): with binary rewards the gradient of a
    truncated log-likelihood of success."""
    mean, _ = returns.group_mean_and_std(returns.trajectory_returns, returns.has_tokens)
    return torch.where(mean > 0, (returns.returns - mean) / torch.where(mean > 0, mean, 1.0), 0.0)


@ADVANTAGES.register("group_center_rescaled")
def group_center_rescaled(returns: Returns) -> Float[Tensor, "N T"]:
    """(r − mean_G)·N/N₊, N₊ the number of trajectories whose return is not 0, at least 1 (GPG, Chu et al. 2025, as verl
    has it)."""
    nonzero = (masked(returns.trajectory_returns, returns.has_tokens) != 0).sum().clamp(min=1)
    return group_center(returns) * len(returns.mask) / nonzero


@ADVANTAGES.register("best_of_group")
def best_of_group(returns: Returns, *, std: str, eps: float) -> Float[Tensor, "N T"]:
    """(r_max − r_second)/(std_G + eps) for the best trajectory of a group, 0 for the others and where two are best: the
    gradient of the group's maximum (pass@k, Tang et al. 2025)."""
    trajectory, valid = returns.trajectory_returns, returns.has_tokens
    _, spread = returns.group_mean_and_std(trajectory, valid, std)
    by_group = returns.groups.to_groups(trajectory)
    inside = returns.groups.to_groups(valid)
    top = torch.where(inside, by_group, -torch.inf)[..., 0].topk(min(2, by_group.shape[1]), dim=1).values
    best, second = top[:, :1], top[:, -1:]
    second = torch.where(second.isinf(), best, second)
    lead = returns.groups.to_rows(best - second)
    won = masked((trajectory == returns.groups.to_rows(best)).to(trajectory.dtype) * lead, valid)
    return standardised(won, spread, eps).expand_as(returns.returns)


@ADVANTAGES.register("term_norm")
def term_norm(
    returns: Returns,
    *,
    reward_terms: Float[Tensor, "N K"],
    term_weights: Float[Tensor, " K"],
    std: str,
    eps: float,
) -> Float[Tensor, "N T"]:
    """Σ_k w_k·(r_k − mean_G)/(std_G + eps) over the terms of the reward, whitened over the update's own tokens (GDPO,
    Liu et al. 2026b). A trajectory counts in the terms that have a value. A KL inside the returns has no effect."""
    known = ~reward_terms.isnan() & returns.has_tokens
    terms = torch.where(known, reward_terms, 0.0)
    mean, spread = returns.group_mean_and_std(terms, known, std)
    centred = masked(terms - mean, known)
    total = (term_weights * torch.where(spread == 0, 0.0, centred / (spread + eps))).sum(1, keepdim=True)
    return whitened(total.expand_as(returns.returns), returns.mask)


@ADVANTAGES.register("optimal_token_baseline")
def optimal_token_baseline(
    returns: Returns, *, logits: Float[Tensor, "N T V"], logp: Float[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """r_j − Σ W_j·r_j / Σ W_j over the trajectories of the group that have a j-th own token, W_j = Σ_{i≤j} (1 − 2π_i +
    Σ_v π_i(v)²): the baseline of least variance, a trajectory's W being what its score is worth (verl's
    `optimal_token_baseline`; 0 where there is no other trajectory, at the tokens that only the longest has)."""
    energy = masked(1 - 2 * logp.exp() + logits.softmax(-1).square().sum(-1), returns.mask)
    width = torch.arange(returns.mask.shape[1], device=returns.mask.device)
    alive = width < lengths(returns.mask)
    weight = left_align(energy.cumsum(1), returns.mask)
    aligned = left_align(returns.returns, returns.mask)
    sums = returns.groups.to_groups(masked(weight * aligned, alive)).sum(1), returns.groups.to_groups(weight).sum(1)
    others = returns.groups.to_groups(alive).sum(1) > 1
    baseline = torch.where(others, sums[0] / (sums[1] + 1e-8), 0.0)
    return returns.returns - undo_left_align(returns.groups.to_rows(baseline), returns.mask)
