"""A process that dies ends the others within seconds, with a message that says who it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults

SURVIVOR = """
import sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from klab.harness.training.distributed.process_group import ProcessGroupLost
from klab.harness.training.distributed.rendezvous import rendezvous
rank, size, meeting, waits_in = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
group = rendezvous(rank, size, meeting, device=torch.device("cpu"))
print(rank, "is there", flush=True)
try:
    if rank == size - 1:
        time.sleep(600)  # is killed
    if waits_in == "an exchange":
        group.all_gather_object("numbers", lambda: rank)
    elif waits_in == "a pass over shared-out weights":
        with group.lockstep():
            dist.all_reduce(torch.ones(3))
    else:
        time.sleep(600)  # as inside NCCL: nothing of torch's ends it
except ProcessGroupLost as lost:
    sys.exit(str(lost))
"""


@pytest.mark.parametrize("waits_in", ["an exchange", "a pass over shared-out weights", "nothing that ends"])
def test_the_others_end_and_name_the_one_that_died(tmp_path: Path, waits_in: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = ["3", str(tmp_path / "meeting"), waits_in]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SURVIVOR, str(rank), *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        for rank, process in enumerate(processes):
            assert process.stdout is not None
            assert process.stdout.readline() == f"{rank} is there\n"
        time.sleep(0.5)
        processes[2].send_signal(signal.SIGKILL)
        for process in processes[:2]:
            _, text = process.communicate(timeout=60)
            # a thread of gloo's sometimes aborts the process while it ends, after everything has been said
            assert process.returncode in (1, -signal.SIGABRT)
            assert f"process 2 of 3 ({os.uname().nodename}, pid {processes[2].pid}) is gone" in text
    finally:
        for process in processes:
            process.kill()
