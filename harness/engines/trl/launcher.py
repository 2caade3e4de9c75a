"""Several processes that train a cell on TRL: started by torchrun or `accelerate launch`, on one node or on several.

The process of the job (on each node, where there are several) starts a launcher of its own, which starts the ranks.
The first node's says by a file which cell is next, and on which port its ranks meet. Rank 0 writes the cell's rows and
its result; what became of it, or why a rank failed, is left in a folder of the run that all of them see.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klab.grid.errors import UserError
from klab.grid.user_code import python_command
from klab.harness.store import CellFolder, Run, files
from klab.harness.training.runner import Progress

PARENT = "KLAB_TRL_PARENT"
"""Environment variable: the process of the job on this node, whose end is the ranks' end."""

STOP, OVER, OUTCOME = "stop", "over", "outcome.json"
"""Files of an attempt: a stop was requested; the first node has done with it; how the cell ended."""

_WORKER = "klab.harness.engines.trl.worker"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_PAUSE = 0.2
_LINGER_SECONDS = 15.0
"""How long the ranks may go on after one of them has failed."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a job as this node sees them.

    Attributes:
        per_node: on each node.
        nodes: of the job.
        node: which of them this is.
        address: of the first node; None: there is but one.
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


def launch_command(ranks: Ranks, port: int, arguments: Sequence[str]) -> list[str]:
    """The command that starts this node's ranks.

    Args:
        port: on the first node, where the ranks meet.
        arguments: of the worker.
    """
    address = ranks.address or "127.0.0.1"
    if ranks.accelerate is None:
        meeting = [
            "--nnodes",
            str(ranks.nodes),
            "--node_rank",
            str(ranks.node),
            "--nproc_per_node",
            str(ranks.per_node),
        ]
        meeting += ["--master_addr", address, "--master_port", str(port), "--module"]
        return python_command("-m", "torch.distributed.run", *meeting, _WORKER, *arguments)
    meeting = ["--num_processes", str(ranks.size), "--num_machines", str(ranks.nodes)]
    meeting += ["--machine_rank", str(ranks.node), "--main_process_ip", address, "--main_process_port", str(port)]
    command = ("-m", "accelerate.commands.launch", "--config_file", ranks.accelerate, *meeting, "--module")
    return python_command(*command, _WORKER, *arguments)


def train_on_ranks(
    run: Run,
    folder: CellFolder,
    ranks: Ranks,
    threads: int,
    progress: Callable[[Progress], None],
    stop: Callable[[], bool],
    halved: bool = False,
) -> str:
    """Train one cell with the ranks of all nodes; called on the first one.

    Returns:
        the cell's state: `finished`, `diverged`, `stopped` or `interrupted`.

    Raises:
        MemoryError: a rank ran out of memory.
        UserError: a rank failed; the message says why.
        ClaimRevoked: the cell was cancelled, or taken over.
        SystemExit: a rank was killed; the cell resumes from its checkpoint when it is launched again.
    """
    control = run.jobs / f"trl-{secrets.token_hex(6)}"
    control.mkdir(parents=True)
    order = {"cell": folder.id, "control": str(control), "port": _free_port(), "halved": halved, "threads": threads}
    try:
        _give(ranks, order)
        with _started(run, ranks, order) as process:
            _supervise(process, folder, control, progress, stop)
        return _outcome(control, process.returncode)
    finally:
        (control / OVER).touch()
        if ranks.nodes == 1:
            shutil.rmtree(control, ignore_errors=True)


def follow_ranks(run: Run, ranks: Ranks) -> None:
    """Start this node's ranks whenever the first node says so, until it says that there is no more to do."""
    assert ranks.orders is not None
    number = 0
    while True:
        order = _awaited(ranks.orders / f"{number}.json")
        if "cell" not in order:
            return
        number += 1
        control = Path(order["control"])
        with _started(run, ranks, order) as process:
            while process.poll() is None and not (control / OVER).exists():
                time.sleep(_PAUSE)
        if process.returncode and not (control / OVER).exists() and not any(_failures(control)):
            text = f"the processes of node {ranks.node} ended with code {process.returncode}"
            write_failure(control, f"node-{ranks.node}", text, memory=False)


def dismiss(ranks: Ranks) -> None:
    """Let the other nodes go."""
    _give(ranks, {})


def write_failure(control: Path, who: str, text: str, memory: bool) -> None:
    """Leave word of why a rank, or a node, failed."""
    record = json.dumps({"text": text, "memory": memory}).encode()
    with suppress(OSError):
        files.replace(control / f"failure-{who}.json", record, durable=False)


def _give(ranks: Ranks, order: Mapping[str, Any]) -> None:
    if ranks.orders is not None:
        ranks.orders.mkdir(parents=True, exist_ok=True)
        number = len(list(ranks.orders.glob("*.json")))
        files.replace(ranks.orders / f"{number}.json", json.dumps(order).encode())


def _awaited(path: Path) -> dict[str, Any]:
    while not path.exists():
        time.sleep(_PAUSE)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@contextmanager
def _started(run: Run, ranks: Ranks, order: Mapping[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """This node's launcher while it runs; at the end nothing of it is left."""
    threads = str(order["threads"])
    environment = {**os.environ, **dict.fromkeys(_THREADS, threads), "PYTHONSAFEPATH": "1", PARENT: str(os.getpid())}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    arguments = [str(run.path), order["cell"], order["control"], threads, str(int(order["halved"]))]
    process = subprocess.Popen(
        launch_command(ranks, int(order["port"]), arguments),
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LINGER_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _supervise(
    process: subprocess.Popen[bytes],
    folder: CellFolder,
    control: Path,
    progress: Callable[[Progress], None],
    stop: Callable[[], bool],
) -> None:
    """Wait until the ranks have ended; pass on a stop, and their progress."""
    updates, seen, failed_at = folder.cell().training.updates, -1, None
    while process.poll() is None:
        folder.assert_owner()
        if stop():
            (control / STOP).touch()
        last = folder.last_metrics() or {"update": 0}
        if last["update"] != seen:
            seen = int(last["update"])
            progress(Progress(folder.id, seen, updates, last.get("reward_mean")))
        if failed_at is None and any(_failures(control)):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _LINGER_SECONDS:
            return
        time.sleep(_PAUSE)


def _outcome(control: Path, code: int) -> str:
    failures = list(_failures(control))
    if any(failure["memory"] for failure in failures):
        raise MemoryError(next(failure["text"] for failure in failures if failure["memory"]))
    if failures:
        raise UserError(failures[0]["text"].rstrip("\n"))
    try:
        return str(json.loads((control / OUTCOME).read_text())["state"])
    except FileNotFoundError:
        sys.exit(f"klab: the processes of a cell on TRL ended with code {code}; their last words are above")


def _failures(control: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(control.glob("failure-*.json")):
        yield json.loads(path.read_text())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
