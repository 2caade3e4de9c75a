"""How a process that trains uses its machine."""

from __future__ import annotations

import torch

from harness.training.allocator import keep_freed_memory


def settle(threads: int) -> None:
    """Torch threads of this process; freed memory stays; numbers below float32's normal range (1.2e-38) are zero.

    Softmax weights and their gradients fall below that range all the time, and a product of matrices that hold such
    numbers takes three to four times as long on x86 processors, for digits that no result can show. Where the
    processor cannot do that, they stay. Threads that are started later take the setting over.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()
