"""Groups: the trajectories of one prompt, laid out side by side so that statistics are sums along an axis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which trajectory belongs to which prompt.

    Sums over a group run along the `size` axis of a `[count, size, …]` layout, in the order of the rows: the same bits
    on every device, unlike atomic additions.

    Attributes:
        index: int `[N]`, the group of each trajectory, 0 … count − 1.
        slot: int `[N]`, its place within the group.
        count: number of groups.
        size: at least the number of trajectories of the largest group.
    """

    index: Tensor
    slot: Tensor
    count: int
    size: int

    @classmethod
    def from_labels(cls, labels: Tensor, count: int | None = None) -> Groups:
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
        """Groups of equal size one after the other, as in a rollout; made once."""
        index = torch.arange(count, device=device).repeat_interleave(size)
        return Groups(index, torch.arange(size, device=device).repeat(count), count, size)

    @cached_property
    def _place(self) -> Tensor:
        """int `[N, 1]`, each trajectory's row in the layout."""
        return (self.index * self.size + self.slot)[:, None]

    def to_groups(self, values: Tensor) -> Tensor:
        """`[N, K]` as `[count, size, K]`, with 0 (False) where a group has fewer trajectories."""
        width = values.shape[1]
        room = torch.zeros(self.count * self.size, width, dtype=values.dtype, device=values.device)
        return room.scatter(0, self._place.expand(-1, width), values).view(self.count, self.size, width)

    def to_rows(self, statistics: Tensor) -> Tensor:
        """A statistic of the groups, `[count, K]`, as one row per trajectory `[N, K]`."""
        return statistics.index_select(0, self.index)


def mean_and_std(values: Tensor, valid: Tensor, std: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation along axis 1 of `[n, m, K]`, over the entries that are `valid`.

    Values are measured from the largest one, so that equal values have their own value as mean and exactly 0 as
    standard deviation, whatever their number. Without valid entries both are 0; a single one has standard deviation 0.

    Args:
        std: "population" (divisor n) or "sample" (n − 1).

    Returns:
        mean and standard deviation, `[n, K]` each.
    """
    number = valid.sum(1)
    anchor = torch.where(number > 0, torch.where(valid, values, -torch.inf).amax(1), 0.0)
    deviation = torch.where(valid, values - anchor[:, None], 0.0)
    offset = deviation.sum(1) / number.clamp(min=1)
    centred = torch.where(valid, deviation - offset[:, None], 0.0)
    divisor = number if std == "population" else number - 1
    return anchor + offset, (centred.square().sum(1) / divisor.clamp(min=1)).sqrt()
