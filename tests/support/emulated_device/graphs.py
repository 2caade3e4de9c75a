"""Recorded graphs of the emulated device: kernels at fixed addresses, replayed on whatever stands there then.

As with CUDA, nothing is computed while recording; whatever waits for the device, copies from the host's ordinary
memory or draws random numbers there is an error; and a replay reads and writes the memory that was recorded, whether
or not it has been freed meanwhile: here that is an error too.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from tests.support.emulated_device.memory import Allocation, Memory, Pool, PoolUse
from tests.support.emulated_device.operations import computed
from tests.support.emulated_device.tensor import tensors

Kernel = tuple[Any, Any, Any, Any]
"""An operation, its arguments and its result, all on the CPU."""


class Graph:
    """What was recorded.

    Attributes:
        kernels: in order.
        replays: how many times it has been launched.
        pool: where the tensors of the capture stand.
    """

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self.replays = 0
        self.pool: Pool | None = None
        self._outside: list[weakref.ref[Allocation]] = []
        self._inside: list[weakref.ref[Allocation]] = []

    @property
    def kept_bytes(self) -> int:
        """Memory allocated in the capture that somebody still holds: the next graph of the pool writes over it."""
        return sum(memory.size for each in self._inside if (memory := each()) is not None)

    def outside(self) -> list[Allocation]:
        """The memory that a replay reads and writes beside its pool.

        Raises:
            RuntimeError: some of it has been freed.
        """
        found = [each() for each in self._outside]
        living = [each for each in found if each is not None]
        if len(living) < len(found):
            raise RuntimeError("a graph is replayed whose memory has been freed")
        return living

    def run(self) -> None:
        """Compute every kernel, into the memory that was recorded."""
        self.replays += 1
        for func, args, kwargs, result in self.kernels:
            again = computed(func, args, kwargs)
            for fixed, value in zip(tensors((result,)), tensors((again,)), strict=True):
                if fixed is not value and fixed.data_ptr() != value.data_ptr():
                    fixed.copy_(value)

    def reset(self) -> None:
        self.kernels, self.pool, self._outside, self._inside = [], None, [], []


class Capture:
    """A graph that is being recorded."""

    def __init__(self, graph: Graph, pool: Pool | None, memory: Memory) -> None:
        self.graph = graph
        graph.reset()
        graph.pool = pool or Pool(memory)
        self.use = PoolUse(graph.pool)
        self._inside: weakref.WeakSet[Allocation] = weakref.WeakSet()
        self._outside: weakref.WeakSet[Allocation] = weakref.WeakSet()
        self._outside_refs: list[weakref.ref[Allocation]] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def allocate(self, size: int) -> Allocation:
        made = Allocation(self.use, size)
        self._inside.add(made)
        return made

    def before(self, used: list[Allocation], written: list[torch.Tensor]) -> None:
        """Remember which memory a kernel uses, and what stands in what it writes to."""
        for each in used:
            if each not in self._inside and each not in self._outside:
                self._outside.add(each)
                self._outside_refs.append(weakref.ref(each))
        for values in written:
            storage = values.untyped_storage()
            if storage.data_ptr() not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
                self._before[storage.data_ptr()] = (whole, whole.clone())

    def add(self, kernel: Kernel) -> None:
        self.graph.kernels.append(kernel)

    def end(self) -> None:
        """Undo what was computed to learn the shapes."""
        for whole, before in self._before.values():
            whole.copy_(before)
        self.graph._inside = [weakref.ref(each) for each in self._inside]
        self.graph._outside = self._outside_refs
