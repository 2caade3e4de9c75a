"""The processes that accelerate or torchrun started, as a `ProcessGroup` whose objects travel on their devices."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from klab.harness.training.distributed.process_group import ProcessGroup


class AcceleratedGroup(ProcessGroup):
    """The process group that an `accelerate.Accelerator` made.

    Objects are exchanged as tensors on the accelerator's device: its backend may know no other (NCCL).
    """

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator.process_index, accelerator.num_processes)
        self._device: torch.device = accelerator.device

    def close(self) -> None:
        """The group is the accelerator's, which closes it."""

    def _gather(self, message: bytes) -> list[bytes]:
        mine = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(self._device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.size)]
        self._wait(dist.all_gather(sizes, torch.tensor([len(mine)], device=self._device), async_op=True))
        lengths = [int(size) for size in sizes]
        padded = torch.nn.functional.pad(mine, (0, max(lengths) - len(mine)))
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self._wait(dist.all_gather(parts, padded, async_op=True))
        return [part[:length].cpu().numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]
