"""The advantage axis: from returns r to A, without gradient.

A trajectory without own tokens has no return and enters no statistic. Where a standard deviation is 0, so is the
advantage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from klab.harness.objective.groups import Groups, mean_and_std
from klab.harness.objective.masking import discounted_suffix_sum, left_align, lengths, masked, undo_left_align
from klab.harness.objective.registry import Registry

ADVANTAGES = Registry("advantage")


@dataclass(frozen=True)
class Returns:
    """What advantages are computed from: the whole update, without gradient.

    Attributes:
        returns: r, at each own token the sum of the per-token rewards from there on.
        token_rewards: R on the last own token, less the KL penalty of each own token; 0 elsewhere.
        rewards: R, the task's reward alone.
        mask: own tokens.
        groups: the trajectories by prompt.
        values: a critic's V, 0 off the own tokens; None without a critic.
    """

    returns: Float[Tensor, "N T"]
    token_rewards: Float[Tensor, "N T"]
    rewards: Float[Tensor, " N"]
    mask: Bool[Tensor, "N T"]
    groups: Groups
    values: Float[Tensor, "N T"] | None = None

    @property
    def trajectory_returns(self) -> Float[Tensor, "N 1"]:
        """Each trajectory's return: r at its first own token."""
        return self.returns[:, :1]

    @property
    def has_tokens(self) -> Bool[Tensor, "N 1"]:
        """Whether each trajectory has own tokens."""
        return self.mask.any(1, keepdim=True)

    def group_mean_and_std(
        self, values: Float[Tensor, "N K"], valid: Bool[Tensor, "N _"], std: str = "population"
    ) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
        """Mean and standard deviation over the group of each trajectory, column by column."""
        mean, spread = mean_and_std(self.groups.to_groups(values), self.groups.to_groups(valid), std)
        return self.groups.to_rows(mean), self.groups.to_rows(spread)


def standardised(centred: Float[Tensor, "N T"], spread: Float[Tensor, "N _"], eps: float) -> Float[Tensor, "N T"]:
    """centred / (spread + eps), and 0 where the spread is 0."""
    return torch.where(spread == 0, 0.0, centred / (spread + eps))


@ADVANTAGES.register("raw")
def raw(returns: Returns) -> Float[Tensor, "N T"]:
    """r: no baseline (REINFORCE, Williams 1992)."""
    return returns.returns


@ADVANTAGES.register("group_norm")
def group_norm(returns: Returns, *, std: str, eps: float) -> Float[Tensor, "N T"]:
    """(r − mean_G)/(std_G + eps) over the group's returns (GRPO, Shao et al. 2024)."""
    mean, spread = returns.group_mean_and_std(returns.trajectory_returns, returns.has_tokens, std)
    return standardised(returns.returns - mean, spread, eps)


@ADVANTAGES.register("group_center")
def group_center(returns: Returns) -> Float[Tensor, "N T"]:
    """r − mean_G (Dr. GRPO, Liu et al. 2025b)."""
    mean, _ = returns.group_mean_and_std(returns.trajectory_returns, returns.has_tokens)
    return returns.returns - mean


@ADVANTAGES.register("leave_one_out")
def leave_one_out(returns: Returns) -> Float[Tensor, "N T"]:
    """r − the mean of the other returns of the group (RLOO, Ahmadian et al. 2024); 0 where there is no other."""
    mean, _ = returns.group_mean_and_std(returns.trajectory_returns, returns.has_tokens)
    others = returns.groups.to_rows(returns.groups.to_groups(returns.has_tokens).sum(1)) - 1
    baseline = mean + (mean - returns.trajectory_returns) / others.clamp(min=1)
    return torch.where(others > 0, returns.returns - baseline, 0.0)


@ADVANTAGES.register("group_center_batch_norm")
def group_center_batch_norm(returns: Returns, *, std: str, eps: float) -> Float[Tensor, "N T"]:
    """(r − mean_G)/(std of all returns of the update + eps) (Lite-PPO, Liu et al. 2025c)."""
    _, spread = mean_and_std(returns.trajectory_returns[None], returns.has_tokens[None], std)
    return standardised(group_center(returns), spread, eps)


@ADVANTAGES.register("batch_norm")
def batch_norm(returns: Returns, *, std: str, eps: float) -> Float[Tensor, "N T"]:
    """r whitened over all own tokens of the update (REINFORCE++, Hu et al. 2025)."""
    mean, spread = mean_and_std(returns.returns.reshape(1, -1, 1), returns.mask.reshape(1, -1, 1), std)
    return standardised(returns.returns - mean, spread, eps)


def _position_mean_and_std(
    returns: Returns, std: str = "population"
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """μ_j and σ_j over the group's trajectories that have a j-th own token."""
    columns = torch.arange(returns.mask.shape[1], device=returns.mask.device)
    alive = columns < lengths(returns.mask)
    mean, spread = returns.group_mean_and_std(left_align(returns.returns, returns.mask), alive, std)
    return undo_left_align(mean, returns.mask), undo_left_align(spread, returns.mask)


@ADVANTAGES.register("position_norm")
def position_norm(returns: Returns, *, std: str, eps: float) -> Float[Tensor, "N T"]:
    """(r_j − μ_j)/(σ_j + eps) over the group's trajectories that have a j-th own token (Bai & Zhang 2026)."""
    mean, spread = _position_mean_and_std(returns, std)
    return standardised(returns.returns - mean, spread, eps)


@ADVANTAGES.register("position_center")
def position_center(returns: Returns) -> Float[Tensor, "N T"]:
    """r_j − μ_j over the group's trajectories that have a j-th own token."""
    mean, _ = _position_mean_and_std(returns)
    return returns.returns - mean


@ADVANTAGES.register("positive")
def positive(returns: Returns, *, rejected: float) -> Float[Tensor, "N T"]:
    """1 where R > 0, `rejected` elsewhere (Xiong et al. 2025): 0 imitates accepted samples (RAFT), −1 is REINFORCE on
    rewards of ±1 (Reinforce-Rej). A KL inside the returns has no effect."""
    signs = torch.where(returns.rewards > 0, 1.0, rejected).to(returns.returns.dtype)
    return signs[:, None].expand_as(returns.returns)


@ADVANTAGES.register("greedy_baseline")
def greedy_baseline(returns: Returns, *, greedy_rewards: Float[Tensor, " N"]) -> Float[Tensor, "N T"]:
    """r − R of the greedy completion of the same prompt (ReMax, Li et al. 2023)."""
    return returns.returns - greedy_rewards[:, None]


@ADVANTAGES.register("length_baseline")
def length_baseline(returns: Returns) -> Float[Tensor, "N T"]:
    """r − Σ H·r_τ / Σ H over the group, r_τ a trajectory's return, KL in the reward included (OPO, Hao et al. 2025)."""
    weight = lengths(returns.mask).to(returns.returns.dtype)
    anchor, _ = returns.group_mean_and_std(returns.trajectory_returns, returns.has_tokens)
    shares = torch.cat([masked(weight * (returns.trajectory_returns - anchor), returns.has_tokens), weight], 1)
    sums = returns.groups.to_rows(returns.groups.to_groups(shares).sum(1))
    return returns.returns - (anchor + sums[:, :1] / sums[:, 1:].clamp(min=1))


@ADVANTAGES.register("gae")
def gae(returns: Returns, *, gamma: float, lam: float, whiten: str) -> Float[Tensor, "N T"]:
    """Generalised advantage estimation (Schulman et al. 2016) over own tokens, with the critic's values or V = 0.

    A_j = Σ_{i≥j} (γλ)^{i−j}·(reward_i + γ·V_{i+1} − V_i), where i + 1 is the next own token and V is 0 after the last.
    `whiten: batch` standardises it to mean 0 and variance 1 over the update's own tokens.
    """
    advantages = _advantage_estimates(returns, gamma, lam)
    return advantages if whiten == "none" else whitened(advantages, returns.mask)


def value_targets(returns: Returns, gamma: float, lam: float) -> Float[Tensor, "N T"]:
    """R̂ = A + V, the regression target of a critic: TD(λ) returns; with λ = 1 the discounted returns."""
    targets = _advantage_estimates(returns, gamma, lam)
    return masked(targets if returns.values is None else targets + returns.values, returns.mask)


def whitened(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """(v − mean)/√(variance + 1e-8) over the own tokens with the unbiased variance, as verl's `masked_whiten`."""
    mean, spread = mean_and_std(values.reshape(1, -1, 1), mask.reshape(1, -1, 1), "sample")
    return (values - mean) * torch.rsqrt(spread.square() + 1e-8)


def _advantage_estimates(returns: Returns, gamma: float, lam: float) -> Float[Tensor, "N T"]:
    """Σ_{i≥j} (γλ)^{i−j}·δ_i of the temporal differences δ_i = reward_i + γ·V_{i+1} − V_i."""
    delta = left_align(returns.token_rewards, returns.mask)
    if returns.values is not None:
        values = left_align(returns.values, returns.mask)
        delta = delta + gamma * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
    return undo_left_align(discounted_suffix_sum(delta, gamma * lam), returns.mask)
