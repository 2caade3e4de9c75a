"""Random numbers as pure functions of (seed, purpose, number).

Every use has a generator of its own, seeded from its purpose: the prompts of rollout 7, the sampling of rollout 7, the
evaluation after update 20. No generator state lives between updates: nothing has to be stored, evaluating cannot change
training, and a phase that is repeated gets the same numbers.
Cells that share a seed share these draws (common random numbers), which is what makes them comparable pairwise.
"""

from __future__ import annotations

import hashlib
import random

import torch


def derived_seed(*parts: int | str) -> int:
    """A non-negative 63-bit seed that depends on every part and on their order, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A fresh torch generator for the draw named by `parts`; on the CPU, so that GPUs are given the same numbers."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def sample_indices(size: int, count: int, *parts: int | str) -> list[int]:
    """`count` indices below `size`, drawn without replacement; where count > size, whole passes come first."""
    if size < 1:
        raise ValueError("cannot choose from an empty split")
    passes, rest = divmod(count, size)
    whole = [*range(size)] * passes if passes else []
    return whole + random.Random(derived_seed(*parts)).sample(range(size), rest)


def permutation(size: int, *parts: int | str) -> list[int]:
    """A random order of 0 … size-1."""
    return random.Random(derived_seed(*parts)).sample(range(size), size)
