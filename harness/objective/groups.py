"""The groups of an update: the trajectories of each prompt, and statistics over them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which trajectory belongs to which prompt.

    Sums over a group run along the `size` axis of a `[count, size, …]` layout, in the order of the rows: the same bits
    on every device, unlike atomic additions.

    Attributes:
        index: the group of each trajectory, 0 … count − 1.
        slot: the position of each trajectory within its group.
        count: number of groups.
        size: at least the number of trajectories of the largest group.
    """

    index: Int[Tensor, " N"]
    slot: Int[Tensor, " N"]
    count: int
    size: int

    @classmethod
    def from_labels(cls, labels: Int[Tensor, " N"], count: int | None = None) -> Groups:
        """Groups from one integer label per trajectory.

        With `count` the labels must be 0 … count − 1 and nothing is read back from the device: this form works where
        the labels themselves are mapped by `torch.func.vmap`, at the price of an `[N, N]` comparison.
        """
        n = labels.shape[0]
        if count is not None:
            same = labels[:, None] == labels[None, :]
            return cls(labels.long(), same.tril(-1).sum(1), count, n)
        index, members = torch.unique(labels, return_inverse=True, return_counts=True)[1:]
        order = torch.argsort(index, stable=True)
        first = members.cumsum(0) - members
        slot = torch.empty_like(index)
        slot[order] = torch.arange(n, device=labels.device) - first[index[order]]
        return cls(index, slot, len(members), int(members.max()) if n else 0)

    @staticmethod
    @lru_cache(maxsize=256)
    def equal_sized(count: int, size: int, device: torch.device) -> Groups:
        """Groups of equal size, one after the other, as in a rollout; cached."""
        index = torch.arange(count, device=device).repeat_interleave(size)
        return Groups(index, torch.arange(size, device=device).repeat(count), count, size)

    @cached_property
    def _flat_index(self) -> Int[Tensor, "N 1"]:
        """Each trajectory's row in the flattened `[count · size, …]` layout."""
        return (self.index * self.size + self.slot)[:, None]

    def to_groups(self, values: Shaped[Tensor, "N K"]) -> Shaped[Tensor, "count size K"]:
        """Rows laid out by group, with 0 (False) where a group has fewer trajectories."""
        width = values.shape[1]
        room = torch.zeros(self.count * self.size, width, dtype=values.dtype, device=values.device)
        return room.scatter(0, self._flat_index.expand(-1, width), values).view(self.count, self.size, width)

    def to_rows(self, statistics: Shaped[Tensor, "count K"]) -> Shaped[Tensor, "N K"]:
        """A statistic of each group, repeated for each of its trajectories."""
        return statistics.index_select(0, self.index)


def mean_and_std(
    values: Float[Tensor, "n m K"], valid: Bool[Tensor, "n m _"], std: str
) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n K"]]:
    """Mean and standard deviation along axis 1, over the entries that are `valid`.

    The sums are of differences from the largest value, so that equal values have exactly their own value as mean and 0
    as standard deviation. Without valid entries both are 0; a single one has standard deviation 0.

    Args:
        std: "population" (divisor n) or "sample" (n − 1).

    Returns:
        mean and standard deviation.
    """
    number = valid.sum(1)
    anchor = torch.where(number > 0, torch.where(valid, values, -torch.inf).amax(1), 0.0)
    deviation = torch.where(valid, values - anchor[:, None], 0.0)
    offset = deviation.sum(1) / number.clamp(min=1)
    centred = torch.where(valid, deviation - offset[:, None], 0.0)
    divisor = number if std == "population" else number - 1
    return anchor + offset, (centred.square().sum(1) / divisor.clamp(min=1)).sqrt()
