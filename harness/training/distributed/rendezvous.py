"""How the processes of a job find one another: rank 0 writes its address into a file, and the others go there."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from klab.harness.training.distributed.process_group import ProcessGroup, ProcessGroupLost

RENDEZVOUS_SECONDS = 300.0
"""How long the processes of a job wait for one another at its start."""

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""How long a process waits in an exchange for those that live and do not come."""

LOOPBACK = "127.0.0.1"


def rendezvous(
    rank: int,
    size: int,
    meeting: Path,
    *,
    device: torch.device,
    address: str = LOOPBACK,
    watch: Callable[[], None] = lambda: None,
) -> ProcessGroup:
    """Meet the other processes of the job; returns when all are there.

    Args:
        meeting: a file that all of them see and no other job has; it exists while they meet.
        device: where they train; gradients are summed by NCCL on GPUs and by Gloo on processors.
        address: where the others reach this process, if it is rank 0; `LOOPBACK`: all are on one machine.
        watch: called while rank 0 waits; may raise.

    Raises:
        ProcessGroupLost: when the others do not come.
    """
    deadline = time.monotonic() + RENDEZVOUS_SECONDS
    if rank == 0:
        store = _lead(size, meeting, address, deadline, watch)
    else:
        store, address = _follow(rank, size, meeting, deadline)
    if address == LOOPBACK and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    if rank == 0:
        meeting.unlink(missing_ok=True)
    return ProcessGroup(rank, size)


def _lead(size: int, meeting: Path, address: str, deadline: float, watch: Callable[[], None]) -> Any:
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    partial = meeting.with_name(meeting.name + ".partial")
    partial.write_text(f"{address} {store.port}")
    partial.rename(meeting)
    try:
        for rank in range(1, size):
            while not store.check([f"process {rank}"]):
                watch()
                if time.monotonic() > deadline:
                    raise ProcessGroupLost(
                        f"klab: process {rank} of {size} did not come within {RENDEZVOUS_SECONDS:.0f} s"
                    )
                time.sleep(0.02)
    except BaseException:
        meeting.unlink(missing_ok=True)
        raise
    return store


def _follow(rank: int, size: int, meeting: Path, deadline: float) -> tuple[Any, str]:
    while not meeting.exists():
        if time.monotonic() > deadline:
            raise ProcessGroupLost(f"klab: process 0 of {size} did not come within {RENDEZVOUS_SECONDS:.0f} s")
        time.sleep(0.02)
    address, port = meeting.read_text().split()
    store = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=RENDEZVOUS_SECONDS))
    store.set(f"process {rank}", "is here")
    return store, address
