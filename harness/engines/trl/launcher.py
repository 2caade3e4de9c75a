"""The command that starts a node's ranks, by torchrun or `accelerate launch`, and the end of all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from klab.grid.user_code import python_command

PARENT = "KLAB_TRL_PARENT"
"""Environment variable: the process of the job on this node, whose end is the ranks' end."""

ATTEMPT = "KLAB_TRL_ATTEMPT"
"""Environment variable: the attempt's folder and the node's number, by which all that belongs to them is known."""

LOOPBACK = "127.0.0.1"

_SHIELDED = "klab.harness.engines.trl.shielded"
_WORKER = "klab.harness.engines.trl.worker"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_TORCHRUN = {"PET_SIGNALS_TO_HANDLE": "SIGQUIT", "PET_SHUTDOWN_TIMEOUT": "5"}
"""torchrun's own settings, which accelerate does not pass on: signals that end it, and how many seconds ranks have to
leave word after another one has failed."""

_DEATH_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a job as this node sees them.

    Attributes:
        per_node: on each node.
        nodes: of the job.
        node: which of them this is.
        address: where the other nodes reach this one, the first; None: there are no others, or this is one of them.
        accelerate: configuration file of accelerate; None: torchrun starts them.
        orders: folder in which the first node says what is next; None where it is alone.
    """

    per_node: int
    nodes: int = 1
    node: int = 0
    address: str | None = None
    accelerate: str | None = None
    orders: Path | None = None

    @property
    def size(self) -> int:
        """All of them."""
        return self.per_node * self.nodes


@dataclass(frozen=True, slots=True)
class Order:
    """What the first node tells the others: train `cell` together.

    Attributes:
        attempt: the attempt's folder.
        address, port: on the first node, where the ranks meet.
        halved: with half of the micro-batch.
        threads: of each process.
    """

    cell: str
    attempt: str
    address: str
    port: int
    halved: bool
    threads: int

    def to_record(self) -> dict[str, object]:
        return asdict(self)


def launch_command(ranks: Ranks, address: str, port: int, arguments: Sequence[str]) -> list[str]:
    """The command that starts this node's ranks.

    Args:
        address, port: on the first node, where the ranks meet.
        arguments: of the worker.
    """
    if ranks.accelerate is None:
        command = ["torch.distributed.run", "--nnodes", str(ranks.nodes), "--node_rank", str(ranks.node)]
        command += ["--nproc_per_node", str(ranks.per_node), "--master_addr", address, "--master_port", str(port)]
    else:
        command = ["accelerate.commands.launch", "--config_file", ranks.accelerate]
        command += ["--num_processes", str(ranks.size), "--num_machines", str(ranks.nodes)]
        command += ["--machine_rank", str(ranks.node), "--main_process_ip", address, "--main_process_port", str(port)]
        if ranks.nodes > 1:  # DeepSpeed's own would log in on the other nodes to start ranks there
            command += ["--deepspeed_multinode_launcher", "standard"]
    return python_command("-m", _SHIELDED, *command, "--module", _WORKER, *arguments)


@contextmanager
def started_ranks(run: Path, ranks: Ranks, order: Order) -> Iterator[subprocess.Popen[bytes]]:
    """This node's launcher while it runs; after the block nothing is left of what it has started."""
    threads = str(order.threads)
    environment = {**os.environ, **dict.fromkeys(_THREADS, threads), "PYTHONSAFEPATH": "1", **_TORCHRUN}
    mark = f"{order.attempt} {ranks.node}"  # nodes may be emulated, several on one machine
    environment |= {"TOKENIZERS_PARALLELISM": "false", PARENT: str(os.getpid()), ATTEMPT: mark}
    arguments = [str(run), order.cell, order.attempt, threads, str(int(order.halved)), str(ranks.size)]
    process = subprocess.Popen(
        launch_command(ranks, order.address, order.port, arguments),
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _kill_rest(mark)


def _kill_rest(mark: str) -> None:
    """Kill what belongs to an attempt on this node, whoever its parent is now: torchrun gives each rank a session of
    its own."""
    while rest := [process for process in psutil.process_iter() if _environment(process).get(ATTEMPT) == mark]:
        for process in rest:
            with suppress(psutil.Error):
                process.kill()
        _, living = psutil.wait_procs(rest, timeout=_DEATH_SECONDS)
        if living:
            return


def _environment(process: psutil.Process) -> Mapping[str, str]:
    """Of a process of this user's that lives; nothing of another."""
    try:
        return {} if process.status() == psutil.STATUS_ZOMBIE else process.environ()
    except (psutil.Error, OSError):
        return {}
