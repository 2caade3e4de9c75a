"""Several processes train a cell on TRL, on one node or on several.

The process of the job (on each node, where there are several) starts a launcher of its own, which starts the ranks.
The first node's says by a file which cell is next, and where its ranks meet. Rank 0 writes the cell's rows and its
result; what became of it, or why a rank failed, is left in the attempt's folder, which all of them see.
"""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from klab.grid.errors import UserError
from klab.harness.engines.trl.attempt_folder import AttemptFolder
from klab.harness.engines.trl.launcher import LOOPBACK, Order, Ranks, started_ranks
from klab.harness.store import CellFolder, Run, files
from klab.harness.training.runner import Progress

_PAUSE = 0.2
_LINGER_SECONDS = 15.0
"""How long the ranks may go on after one of them has failed."""


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
    attempt = AttemptFolder(run.jobs / f"trl-{secrets.token_hex(6)}")
    attempt.path.mkdir(parents=True)
    order = Order(folder.id, str(attempt.path), ranks.address or LOOPBACK, _free_port(), halved, threads)
    try:
        _give(ranks, order.to_record())
        with started_ranks(run.path, ranks, order) as process:
            _supervise(process, folder, attempt, progress, stop)
        return _outcome(attempt, process.returncode)
    finally:
        attempt.close()
        if ranks.nodes == 1:
            shutil.rmtree(attempt.path, ignore_errors=True)


def follow_ranks(run: Run, ranks: Ranks) -> None:
    """Start this node's ranks whenever the first node says so, until it says that there is no more to do."""
    assert ranks.orders is not None
    number = 0
    while True:
        record = _awaited(ranks.orders / f"{number}.json")
        if "cell" not in record:
            return
        number += 1
        order = Order(**record)
        attempt = AttemptFolder(Path(order.attempt))
        with started_ranks(run.path, ranks, order) as process:
            while process.poll() is None and not attempt.is_over():
                time.sleep(_PAUSE)
            if process.poll() and not attempt.is_over():
                text = f"the processes of node {ranks.node} ended with code {process.returncode}"
                attempt.leave_failure(f"node-{ranks.node}", "lost", text)


def dismiss(ranks: Ranks) -> None:
    """Let the other nodes go."""
    _give(ranks, {})


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


def _supervise(
    process: subprocess.Popen[bytes],
    folder: CellFolder,
    attempt: AttemptFolder,
    progress: Callable[[Progress], None],
    stop: Callable[[], bool],
) -> None:
    """Wait until the ranks have ended; pass on a stop, and their progress."""
    updates, seen, failed_at = folder.cell().training.updates, -1, None
    while process.poll() is None:
        folder.assert_owner()
        if stop():
            attempt.request_stop()
        last = folder.last_metrics() or {"update": 0}
        if last["update"] != seen:
            seen = int(last["update"])
            progress(Progress(folder.id, seen, updates, last.get("reward_mean")))
        if failed_at is None and any(attempt.failures()):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _LINGER_SECONDS:
            return
        time.sleep(_PAUSE)


def _outcome(attempt: AttemptFolder, code: int) -> str:
    """How the cell ended. That a process is gone is said only where none has said more."""
    failures = {kind: [each.text for each in attempt.failures() if each.kind == kind] for kind in ("memory", "error")}
    if failures["memory"]:
        raise MemoryError(failures["memory"][0])
    if failures["error"]:
        raise UserError(failures["error"][0].rstrip("\n"))
    state = attempt.outcome()
    if state is None:
        lost = "; ".join(each.text for each in attempt.failures())
        sys.exit(f"klab: the processes of a cell on TRL ended with code {code}: {lost or 'their last words are above'}")
    return state


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
