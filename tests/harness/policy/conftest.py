"""What tests of bits need of the machine."""

from __future__ import annotations

import pytest
import torch

from klab.harness.training.runtime.pack_invariance import pack_invariant


@pytest.fixture
def pack_invariant_kernels() -> None:
    """One thread, and kernels with which a pack changes no bits; where there are none, cells are not packed."""
    torch.set_num_threads(1)
    if not pack_invariant():
        pytest.skip("this processor's kernels depend on a matrix's place in a pack; cells are trained alone here")
