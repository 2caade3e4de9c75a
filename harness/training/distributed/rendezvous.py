"""How the processes of a job find one another: rank 0 writes address, port and a secret into a file that others read.

The file can be read by its owner only (mode 0600) and is removed once all processes have joined. Rank 0 listens on one
address alone: the loopback when all processes are on one machine, else that of the interface which `GLOO_SOCKET_IFNAME`
names, else that of its host name. Processes prove that they know the secret, and sign all messages with it (see
`messages.py`). Sums of gradients travel unsigned, as numbers: on a network that is not trusted, a cluster's own
isolation of jobs has to protect them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from klab.harness.training.distributed.network import interface_address, socket_address
from klab.harness.training.distributed.peers import PeerWatch
from klab.harness.training.distributed.process_group import ProcessGroup, ProcessGroupLost

RENDEZVOUS_SECONDS = 300.0
"""How long the processes of a job wait for one another at its start."""

COLLECTIVE_MINUTES = 60.0
"""How long an exchange may take while all processes are alive, unless `resources.collective_minutes` says otherwise:
one of them may sample longer, or have slower rewards, than the others."""

DEVICE_MINUTES = 10.0
"""The same of a collective operation of NCCL, which all processes begin within seconds of one another."""

LOOPBACK = "127.0.0.1"


def rendezvous(
    rank: int,
    size: int,
    file: Path,
    *,
    device: torch.device,
    address: str = LOOPBACK,
    watch: Callable[[], None] = lambda: None,
    minutes: float = COLLECTIVE_MINUTES,
) -> ProcessGroup:
    """Meet the other processes of the job; returns when all are there.

    Args:
        file: all processes see it and no other job has it; it exists while they meet.
        device: where they train; gradients are summed by NCCL on GPUs and by Gloo on processors.
        address: where the others reach this process, if it is rank 0; `LOOPBACK`: all are on one machine.
        watch: called while rank 0 waits; may raise.
        minutes: how long an exchange may take.

    Raises:
        ProcessGroupLost: when the others do not come.
    """
    deadline = time.monotonic() + RENDEZVOUS_SECONDS
    if rank == 0:
        listener = _bind(address)
        watched = _bind(address)
        store, address, secret = _listen(size, file, listener, watched.getsockname()[1], deadline, watch)
    else:
        store, address, secret, port = _connect(rank, size, file, deadline)
    if address == LOOPBACK and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        peers = (
            PeerWatch.lead(size, watched, secret, watch)
            if rank == 0
            else PeerWatch.join(rank, size, address, port, secret)
        )
    except OSError as error:
        raise ProcessGroupLost(f"klab: process {rank} of {size}: {error}") from error
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=minutes))
    device_group = None
    if device.type == "cuda":
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        limit = timedelta(minutes=min(minutes, DEVICE_MINUTES))
        device_group = dist.new_group(backend="nccl", timeout=limit)
    if rank == 0:
        file.unlink(missing_ok=True)
    return ProcessGroup(rank, size, secret, device_group, peers)


def _listen(
    size: int, file: Path, listener: socket.socket, watched: int, deadline: float, watch: Callable[[], None]
) -> tuple[Any, str, bytes]:
    address, port = listener.getsockname()[:2]
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    secret = secrets.token_bytes(32)
    partial = file.with_name(file.name + ".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        json.dump({"address": address, "port": port, "watch": watched, "secret": secret.hex()}, opened)
    partial.rename(file)
    try:
        for rank in range(1, size):
            while not store.check([_key(rank)]):
                watch()
                if time.monotonic() > deadline:
                    raise ProcessGroupLost(
                        f"klab: process {rank} of {size} did not come within {RENDEZVOUS_SECONDS:.0f} s"
                    )
                time.sleep(0.02)
            if not hmac.compare_digest(store.get(_key(rank)).decode(), _proof(rank, secret)):
                raise ProcessGroupLost(f"klab: what came as process {rank} of {size} does not know this job's secret")
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return store, address, secret


def _connect(rank: int, size: int, file: Path, deadline: float) -> tuple[Any, str, bytes, int]:
    while not file.exists():
        if time.monotonic() > deadline:
            raise _absent(0, size)
        time.sleep(0.02)
    found = json.loads(file.read_text())
    address, secret = found["address"], bytes.fromhex(found["secret"])
    store = TCPStore(address, found["port"], is_master=False, timeout=timedelta(seconds=RENDEZVOUS_SECONDS))
    store.set(_key(rank), _proof(rank, secret))
    return store, address, secret, int(found["watch"])


def _absent(rank: int, size: int) -> ProcessGroupLost:
    return ProcessGroupLost(f"klab: process {rank} of {size} did not come within {RENDEZVOUS_SECONDS:.0f} s")


def _bind(address: str) -> socket.socket:
    """A socket that listens on a free port of one address; of an interface's where the environment names one.

    Raises:
        ProcessGroupLost: where there is no such interface, or it has none.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if address != LOOPBACK and interface and sys.platform == "linux":
        try:
            address = interface_address(interface)
        except OSError as error:
            raise ProcessGroupLost(f"klab: {error.strerror}") from error
    family, where = socket_address(address)
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind(where)
    listener.listen(1024)
    return listener


def _key(rank: int) -> str:
    return f"process {rank}"


def _proof(rank: int, secret: bytes) -> str:
    return hashlib.blake2b(_key(rank).encode(), key=secret).hexdigest()
