"""Bytes of the tensors that operations make, counted allocation by allocation, forward and backward."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts storages that are made inside the block, for as long as something refers to them.

    What an operation allocates and frees within itself is not seen.

    Attributes:
        now, peak: bytes that live, and the most that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {each.untyped_storage() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self._add(each.untyped_storage(), before)
        self.peak = max(self.peak, self.now)
        return found

    def _add(self, storage: torch.UntypedStorage, before: set[torch.UntypedStorage]) -> None:
        if storage in self._seen or storage in before:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.now += size
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
