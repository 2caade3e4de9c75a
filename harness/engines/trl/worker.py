"""One of the processes that train a cell on TRL: `python -m klab.harness.engines.trl.worker RUN CELL ATTEMPT THREADS
HALVED SIZE`, started by torchrun or accelerate."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from pathlib import Path

from klab.grid import UserError, user_code
from klab.grid.accelerate_file import SEVERAL
from klab.harness.engines.trl.attempt_folder import AttemptFolder, Kind
from klab.harness.engines.trl.launcher import PARENT
from klab.harness.engines.trl.shielded import ignore_signals
from klab.harness.store import Run

_LOOK_SECONDS = 1.0
_CONNECTION_WORDS = ("gloo", "NCCL", "TCPStore", "Connection closed by peer", "Connection reset by peer")
"""What torch says where another process is gone, in errors that have no class of their own."""


def main(run_path: str, cell: str, attempt: AttemptFolder, threads: int, halved: bool, size: int) -> None:
    """Train the cell, and leave word of how that ended.

    Raises:
        SystemExit: it failed; the reason is written down.
    """
    ignore_signals()
    threading.Thread(target=_end_with_parent, args=(int(os.environ[PARENT]),), daemon=True).start()
    rank = int(os.environ.get("RANK", "0"))
    from klab.harness.training.distributed.process_group import ProcessGroupLost
    from klab.harness.training.runtime.torch_settings import configure_torch

    run = Run.open(run_path)
    try:
        _check_size(size)
        with user_code.searching(known=run.user_code()), configure_torch(threads):
            from klab.harness.engines.trl.settings import require_trl

            require_trl()
            from klab.harness.engines.trl.cell import train

            state = train(run, run.cell(cell), processes=size, stop=attempt.stop_requested, halved=halved)
    except (Exception, ProcessGroupLost) as error:
        kind = _kind(error)
        text = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)
        said = f"process {rank} has lost the others" if kind == "lost" else text
        attempt.leave_failure(f"{rank:06d}", kind, said)
        os._exit(1)  # the others may wait for this rank for ever
    if rank == 0:
        attempt.leave_outcome(state)


def _check_size(size: int) -> None:
    """Raises UserError where the launcher has started another number of processes than klab asked it for."""
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found != size:
        raise UserError(
            f"{size} processes are to train a cell together, and the launcher has started {found}",
            key="resources.launcher",
            hint=f"With accelerate: distributed_type of its configuration is one of {', '.join(SEVERAL)}.",
        )


def _kind(error: BaseException) -> Kind:
    """Whether memory ran out, another process is gone, or the cell itself failed."""
    from torch.distributed import DistError

    from klab.harness.training.distributed.process_group import ProcessGroupLost
    from klab.harness.training.runtime.oom import is_out_of_memory

    if isinstance(error, Exception) and is_out_of_memory(error):
        return "memory"
    words = str(error) if type(error) is RuntimeError else ""
    lost = isinstance(error, ProcessGroupLost | DistError) or any(word in words for word in _CONNECTION_WORDS)
    return "lost" if lost else "error"


def _end_with_parent(parent: int) -> None:
    """End this process when the job's process is gone."""
    while True:
        time.sleep(_LOOK_SECONDS)
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)
        except PermissionError:
            pass


if __name__ == "__main__":
    run_, cell_, attempt_, threads_, halved_, size_ = sys.argv[1:]
    main(run_, cell_, AttemptFolder(Path(attempt_)), int(threads_), halved_ == "1", int(size_))
