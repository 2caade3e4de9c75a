"""Several processes that train a job's cells together: started on this machine, or tasks of a Slurm job.

The first one leads: it holds the claims and writes all files; the others follow its commands. They ignore signals, and
end when the first one does. As a program this module is one of the others:
`python -m klab.harness.dispatch.processes RUN RANK SIZE THREADS MEETING`.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from klab.grid import user_code
from klab.harness.dispatch.threads import limit_threads
from klab.harness.store import Run, machine
from klab.harness.training.distributed.network import collective_minutes

if TYPE_CHECKING:
    from klab.harness.training.distributed.process_group import ProcessGroup

_END_SECONDS = 20.0
"""How long processes that were let go may take to end."""


@contextmanager
def started_group(run: Run, size: int, threads: int = 1, devices: Sequence[str] = ()) -> Iterator[ProcessGroup | None]:
    """A process_group of this process, which leads, and `size` - 1 others that are started here and end with the block.

    Args:
        devices: GPUs, as CUDA names them, one for each; none leaves the environment as it is.
    """
    if size == 1:
        yield None
        return
    run.jobs.mkdir(parents=True, exist_ok=True)
    meeting = run.jobs / f"meeting-{secrets.token_hex(6)}"
    others = [_start_follower(run, rank, size, threads, meeting, devices) for rank in range(1, size)]
    try:
        if devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[0]
        with leading_group(run, size, meeting, others=others) as process_group:
            yield process_group
        with suppress(subprocess.TimeoutExpired):
            for other in others:
                other.wait(_END_SECONDS)
    finally:
        for other in others:
            other.kill()
            other.wait()


@contextmanager
def leading_group(
    run: Run, size: int, meeting: Path, address: str | None = None, others: Sequence[subprocess.Popen[bytes]] = ()
) -> Iterator[ProcessGroup]:
    """The process group that this process leads, once all have joined; the others are released after the block.

    Args:
        address: where they reach this process; None: all are on this machine.
        others: those that were started here, watched while they are awaited.

    Raises:
        SystemExit: where the processes lose one another.
    """
    from klab.harness.training.distributed.process_group import ProcessGroupLost
    from klab.harness.training.distributed.rendezvous import LOOPBACK, rendezvous
    from klab.harness.training.distributed.worker import release_workers
    from klab.harness.training.pack import device

    def watch() -> None:
        for rank, other in enumerate(others, 1):
            if other.poll() is not None:
                raise ProcessGroupLost(
                    f"klab: process {rank} of {size} ended at its start with code {other.returncode}"
                )

    try:
        process_group = rendezvous(
            0,
            size,
            meeting,
            device=device(),
            address=address or LOOPBACK,
            watch=watch,
            minutes=collective_minutes(run),
        )
        try:
            yield process_group
        finally:
            release_workers(process_group)
            process_group.close()
    except ProcessGroupLost as lost:
        sys.exit(str(lost))


def follow_group(run: str | Path, rank: int, size: int, threads: int, meeting: Path) -> None:
    """Be one of the others, until the first process is done.

    Raises:
        SystemExit: where the processes lose one another.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    from klab.harness.training.distributed import worker as parallel
    from klab.harness.training.distributed.process_group import ProcessGroupLost
    from klab.harness.training.distributed.rendezvous import rendezvous
    from klab.harness.training.pack import device

    try:
        minutes = collective_minutes(Run.open(run))
        process_group = rendezvous(rank, size, meeting, device=device(), minutes=minutes)
        try:
            with user_code.searching(known=Run.open(run).user_code()):
                parallel.run_worker(run, process_group, threads)
        finally:
            process_group.close()
    except ProcessGroupLost as lost:
        sys.exit(str(lost))


def select_gpu(local: int) -> None:
    """Leave the `local`-th process of a node one of the GPUs that all of them see. Before torch looks for GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [str(number) for number in range(len(machine.gpus()))] if visible is None else visible.split(",")
    if len(found) > 1:
        if local >= len(found):
            sys.exit(f"klab: process {local} of this node has no GPU: there are {', '.join(found)}")
        os.environ["CUDA_VISIBLE_DEVICES"] = found[local]


def _start_follower(
    run: Run, rank: int, size: int, threads: int, meeting: Path, devices: Sequence[str]
) -> subprocess.Popen[bytes]:
    """Start one of the others; it writes where this process writes, and no terminal signals it."""
    environment = dict(os.environ)
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[rank]
    words = [str(run.path), str(rank), str(size), str(threads), str(meeting)]
    return subprocess.Popen(
        user_code.python_command("-m", "klab.harness.dispatch.processes", *words),
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


if __name__ == "__main__":
    limit_threads(int(sys.argv[4]))
    follow_group(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
