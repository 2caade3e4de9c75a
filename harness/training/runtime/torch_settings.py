"""How a process that trains uses its machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from klab.harness.store.kernels import fix_kernels
from klab.harness.training.runtime.allocator import keep_freed_memory

_SMALLEST = torch.finfo(torch.float32).tiny


@contextmanager
def configure_torch(threads: int) -> Iterator[None]:
    """Torch threads and kernels of this process; freed memory stays; numbers below float32's range (1.2e-38) are zero.

    float32 products are of float32 numbers: GPUs do not round the factors to TF32's 10 bits.

    Softmax weights and their gradients fall below that range all the time, and a product of matrices that hold such
    numbers takes three to four times as long on x86 processors, for digits that no result can show. Where the
    processor cannot do that, they stay. Threads that are started meanwhile take the setting over; afterwards such
    numbers and products are what they were before.
    """
    fix_kernels()
    torch.set_num_threads(threads)
    keep_freed_memory()
    before = not torch.tensor(_SMALLEST).div(2)
    torch.set_flush_denormal(True)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_flush_denormal(before)
