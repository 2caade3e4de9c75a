"""The updates of the exact lab: which trajectories each is made of, and its probability.

An update is `group_size` trajectories of the one prompt that a tabular policy has (or several such groups),
drawn independently from the behaviour policy. Statistics over "the batch" (whitening, adaptive exponent, token-mean
denominator) are statistics over one such update. The objective does not depend on the order inside a group, so groups
are enumerated as multisets with multinomial weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from klab.harness.exact.tabular import TabularPolicy

Method = Literal["trajectories", "groups", "monte carlo"]

LARGEST_GROUPS = 50_000
"""Most multisets of trajectories that are enumerated by default. With 27 trajectories (V = H = 3) groups of 2, 3 and 4
are 378, 3,654 and 27,405 multisets; groups of 5 are 169,911 and go to Monte Carlo."""


@dataclass(frozen=True, slots=True, eq=False)
class Updates:
    """U updates of N trajectories each.

    Attributes:
        members: indices into the policy's trajectories; the first `group_size` columns are the first
            group.
        weights: the probability of each update (exact), or 1/U (Monte Carlo); sums to 1.
        group_size: trajectories of a group; N is a multiple of it.
        method: how the updates were obtained.
    """

    members: Int64[Tensor, "U N"]
    weights: Float64[Tensor, " U"]
    group_size: int
    method: Method

    @property
    def exact(self) -> bool:
        """Whether sums over these updates are expectations, not estimates."""
        return self.method != "monte carlo"

    @property
    def trajectories(self) -> int:
        """N, the trajectories of one update."""
        return self.members.shape[1]


def every_trajectory(behaviour: TabularPolicy) -> Updates:
    """One update per trajectory: exact for estimators that are a mean over independent trajectories."""
    return Updates(
        torch.arange(len(behaviour.trajectories))[:, None], behaviour.probabilities().detach(), 1, "trajectories"
    )


def count_groups(trajectories: int, group_size: int) -> int:
    """Number of multisets of `group_size` out of `trajectories`."""
    return math.comb(trajectories + group_size - 1, group_size)


def every_group(behaviour: TabularPolicy, group_size: int) -> Updates:
    """One update per multiset of `group_size` trajectories, weighted by its multinomial probability.

    The number of updates is `count_groups`; the caller keeps it feasible.
    """
    members = torch.tensor(list(combinations_with_replacement(range(len(behaviour.trajectories)), group_size)))
    orderings = _log_factorial(torch.tensor(group_size)) - _log_multiplicities(members)
    weights = (orderings + behaviour.logp().detach()[members].sum(-1)).exp()
    return Updates(members, weights, group_size, "groups")


def sampled_updates(
    behaviour: TabularPolicy, group_size: int, count: int, generator: torch.Generator | None = None, groups: int = 1
) -> Updates:
    """`count` independent updates of `groups` groups each, drawn from the behaviour policy."""
    members = behaviour.sample(count * groups * group_size, generator).view(count, groups * group_size)
    return Updates(members, torch.full((count,), 1.0 / count, dtype=torch.float64), group_size, "monte carlo")


def _log_factorial(counts: Int64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    return torch.lgamma(counts.to(torch.float64) + 1)


def _log_multiplicities(members: Int64[Tensor, "U N"]) -> Float64[Tensor, " U"]:
    """Sum over distinct members of log(multiplicity!), from sorted rows: the k-th equal neighbour contributes log k."""
    run = torch.ones_like(members)
    for column in range(1, members.shape[1]):
        same = members[:, column] == members[:, column - 1]
        run[:, column] = torch.where(same, run[:, column - 1] + 1, run[:, column])
    return run.to(torch.float64).log().sum(-1)
