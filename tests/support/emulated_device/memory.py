"""Memory of the emulated devices: allocations, how many bytes live, the peak, a capacity that can be exceeded."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tests.support.emulated_device.streams import Stream

GRANULE = 512
"""Bytes; allocations are rounded up to a multiple, as CUDA's caching allocator does."""


@dataclass(eq=False)
class Memory:
    """The memory of one device.

    Attributes:
        capacity: bytes; None: any number.
        allocated, peak: bytes of living tensors now, and the most since the peak was reset.
        pools: of graphs; they keep what their captures needed at the peak for as long as they live.
    """

    index: int
    capacity: int | None = None
    allocated: int = 0
    peak: int = 0
    pools: weakref.WeakSet[Pool] = field(default_factory=weakref.WeakSet)

    @property
    def reserved(self) -> int:
        """Bytes of living tensors and of graphs' pools."""
        return self.allocated + sum(pool.size for pool in self.pools)

    def take(self, size: int) -> None:
        """Raises torch.OutOfMemoryError where the capacity does not suffice."""
        if self.capacity is not None and self.reserved + size > self.capacity:
            free = self.capacity - self.reserved
            raise torch.OutOfMemoryError(f"emulated device out of memory. Tried to allocate {size} of {free} bytes")
        self.allocated += size
        self.peak = max(self.peak, self.reserved)


class Pool:
    """Private memory of graphs: a capture's tensors are placed in it, one capture over another's.

    Attributes:
        size: the most bytes that lived at once in a capture into it.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.size = 0
        memory.pools.add(self)


class PoolUse:
    """Bytes of a pool that live during one capture."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.allocated = pool, 0

    def take(self, size: int) -> None:
        self.allocated += size
        grown = self.allocated - self.pool.size
        if grown > 0:
            self.pool.memory.take(grown)
            self.pool.memory.allocated -= grown  # counted as the pool's from here on
            self.pool.size = self.allocated


class Allocation:
    """The memory that a tensor and all of its views share; freed with the last of them.

    Attributes:
        written: the stream that wrote to it last, and when in that stream's time.
        read: when each stream read it last.
    """

    __slots__ = ("__weakref__", "memory", "read", "size", "written")

    def __init__(self, memory: Memory | PoolUse, size: int) -> None:
        self.memory, self.size = memory, 0
        self.written: tuple[Stream, int] | None = None
        self.read: dict[Stream, int] = {}
        rounded = -(-size // GRANULE) * GRANULE
        memory.take(rounded)
        self.size = rounded

    def __del__(self) -> None:
        self.memory.allocated -= self.size
