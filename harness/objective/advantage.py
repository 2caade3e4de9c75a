"""Advantage modes: from returns to A, without gradient.

A trajectory without own tokens has no return and enters no statistic. Where the divisor is 0 the advantage is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from klab.harness.objective.groups import Groups, mean_and_std
from klab.harness.objective.masking import left_align, lengths, masked, suffix_sum, undo_left_align
from klab.harness.objective.registry import Registry

ADVANTAGES = Registry("advantage", "returns")


@dataclass(frozen=True)
class Returns:
    """What the modes read; everything of the whole update and without gradient.

    Attributes:
        returns: r `[N, T]`, at each own token the sum of the rewards from there on.
        token_rewards: `[N, T]`, R on the last own token less the KL charges of each own token; 0 elsewhere.
        rewards: R `[N]`, the task's reward alone.
        mask: own tokens, bool `[N, T]`.
        groups: the trajectories by prompt.
        greedy_rewards: `[N]`, or None.
        values: `[N, T]`, 0 off the own tokens, or None.
    """

    returns: Tensor
    token_rewards: Tensor
    rewards: Tensor
    mask: Tensor
    groups: Groups
    greedy_rewards: Tensor | None = None
    values: Tensor | None = None

    @property
    def trajectory_returns(self) -> Tensor:
        """Each trajectory's return: r at its first own token, `[N, 1]`."""
        return self.returns[:, :1]

    @property
    def has_tokens(self) -> Tensor:
        """bool `[N, 1]`: the trajectory has own tokens."""
        return self.mask.any(1, keepdim=True)

    def group_mean_and_std(self, values: Tensor, valid: Tensor, std: str = "population") -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the group of each trajectory, column by column, `[N, K]` each."""
        mean, spread = mean_and_std(self.groups.to_groups(values), self.groups.to_groups(valid), std)
        return self.groups.to_rows(mean), self.groups.to_rows(spread)


def _divided(centred: Tensor, spread: Tensor, eps: float) -> Tensor:
    return torch.where(spread == 0, 0.0, centred / (spread + eps))


@ADVANTAGES.register("raw")
def raw(returns: Returns) -> Tensor:
    """r (REINFORCE)."""
    return returns.returns


@ADVANTAGES.register("group_norm")
def group_norm(returns: Returns, *, std: str, eps: float) -> Tensor:
    """(r − mean_G)/(std_G + eps) over the group's returns (GRPO)."""
    mean, spread = returns.group_mean_and_std(returns.trajectory_returns, returns.has_tokens, std)
    return _divided(returns.returns - mean, spread, eps)


@ADVANTAGES.register("group_center")
def group_center(returns: Returns) -> Tensor:
    """r − mean_G (Dr. GRPO)."""
    mean, _ = returns.group_mean_and_std(returns.trajectory_returns, returns.has_tokens)
    return returns.returns - mean


@ADVANTAGES.register("leave_one_out")
def leave_one_out(returns: Returns) -> Tensor:
    """r − the mean of the other returns of the group (RLOO); 0 where there is no other."""
    mean, _ = returns.group_mean_and_std(returns.trajectory_returns, returns.has_tokens)
    others = returns.groups.to_rows(returns.groups.to_groups(returns.has_tokens).sum(1)) - 1
    baseline = mean + (mean - returns.trajectory_returns) / others.clamp(min=1)
    return torch.where(others > 0, returns.returns - baseline, 0.0)


@ADVANTAGES.register("group_center_batch_norm")
def group_center_batch_norm(returns: Returns, *, std: str, eps: float) -> Tensor:
    """(r − mean_G)/(std of all returns of the update + eps) (Lite-PPO)."""
    _, spread = mean_and_std(returns.trajectory_returns[None], returns.has_tokens[None], std)
    return _divided(group_center(returns), spread, eps)


@ADVANTAGES.register("batch_norm")
def batch_norm(returns: Returns, *, std: str, eps: float) -> Tensor:
    """r whitened over all own tokens of the update (REINFORCE++)."""
    mean, spread = mean_and_std(returns.returns.reshape(1, -1, 1), returns.mask.reshape(1, -1, 1), std)
    return _divided(returns.returns - mean, spread, eps)


def _position_moments(returns: Returns, std: str = "population") -> tuple[Tensor, Tensor]:
    columns = torch.arange(returns.mask.shape[1], device=returns.mask.device)
    alive = columns < lengths(returns.mask)
    mean, spread = returns.group_mean_and_std(left_align(returns.returns, returns.mask), alive, std)
    return undo_left_align(mean, returns.mask), undo_left_align(spread, returns.mask)


@ADVANTAGES.register("position_norm")
def position_norm(returns: Returns, *, std: str, eps: float) -> Tensor:
    """(r_j − μ_j)/(σ_j + eps) over the group's trajectories that have a j-th own token (S1)."""
    mean, spread = _position_moments(returns, std)
    return _divided(returns.returns - mean, spread, eps)


@ADVANTAGES.register("position_center")
def position_center(returns: Returns) -> Tensor:
    """r_j − μ_j over the group's trajectories that have a j-th own token."""
    mean, _ = _position_moments(returns)
    return returns.returns - mean


@ADVANTAGES.register("positive")
def positive(returns: Returns, *, rejected: float) -> Tensor:
    """1 where R > 0, `rejected` elsewhere: imitate what was accepted (RAFT, with 0), or REINFORCE on rewards of ±1
    (Reinforce-Rej, with −1); a KL inside the returns has no effect."""
    verdict = torch.where(returns.rewards > 0, 1.0, rejected).to(returns.returns.dtype)
    return verdict[:, None].expand_as(returns.returns)


@ADVANTAGES.register("greedy_baseline")
def greedy_baseline(returns: Returns) -> Tensor:
    """r − R of the greedy completion of the same prompt (ReMax)."""
    if returns.greedy_rewards is None:
        raise ValueError("the advantage 'greedy_baseline' needs greedy_rewards")
    return returns.returns - returns.greedy_rewards[:, None]


@ADVANTAGES.register("length_baseline")
def length_baseline(returns: Returns) -> Tensor:
    """r − Σ H·R / Σ H over the group (OPO)."""
    weight = lengths(returns.mask).to(returns.returns.dtype)
    anchor, _ = returns.group_mean_and_std(returns.rewards[:, None], returns.has_tokens)
    shares = torch.cat([masked(weight * (returns.rewards[:, None] - anchor), returns.has_tokens), weight], 1)
    sums = returns.groups.to_rows(returns.groups.to_groups(shares).sum(1))
    return returns.returns - (anchor + sums[:, :1] / sums[:, 1:].clamp(min=1))


@ADVANTAGES.register("gae")
def gae(returns: Returns, *, gamma: float, lam: float, whiten: str) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016) over own tokens, with the critic's values or V = 0.

    A_j = Σ_{i≥j} (γλ)^{i−j}·(reward_i + γ·V_{i+1} − V_i), where i + 1 is the next own token and V is 0 after the last.
    `whiten: batch` takes it to mean 0 and variance 1 over the update's own tokens.
    """
    advantages = _temporal_differences(returns, gamma, lam)
    return advantages if whiten == "none" else _whitened(advantages, returns.mask)


def value_targets(returns: Returns, gamma: float, lam: float) -> Tensor:
    """R̂ = A + V `[N, T]`, what a critic's values are drawn to: TD(λ) returns, with λ = 1 the discounted returns."""
    targets = _temporal_differences(returns, gamma, lam)
    return masked(targets if returns.values is None else targets + returns.values, returns.mask)


def _whitened(values: Tensor, mask: Tensor) -> Tensor:
    """(v − mean)/√(variance + 1e-8) over the own tokens with the unbiased variance, as verl's `masked_whiten`."""
    mean, spread = mean_and_std(values.reshape(1, -1, 1), mask.reshape(1, -1, 1), "sample")
    return (values - mean) * torch.rsqrt(spread.square() + 1e-8)


def _temporal_differences(returns: Returns, gamma: float, lam: float) -> Tensor:
    surprise = left_align(returns.token_rewards, returns.mask)
    if returns.values is not None:
        values = left_align(returns.values, returns.mask)
        surprise = surprise + gamma * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
    if gamma * lam == 1.0:
        return undo_left_align(suffix_sum(surprise), returns.mask)
    step = torch.arange(surprise.shape[1], device=surprise.device, dtype=surprise.dtype)
    ahead = step[:, None] - step[None, :]
    decay = torch.where(ahead >= 0, (gamma * lam) ** ahead.clamp(min=0), 0.0)
    return undo_left_align(surprise @ decay, returns.mask)
