"""One of the processes that train a cell on TRL: `python -m klab.harness.engines.trl.worker RUN CELL CONTROL THREADS
HALVED`, started by torchrun or accelerate."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from klab.grid import UserError, user_code
from klab.harness.engines.trl.launcher import OUTCOME, PARENT, STOP, write_failure
from klab.harness.store import Run, files

_LOOK_SECONDS = 1.0


def main(run_path: str, cell: str, control: Path, threads: int, halved: bool) -> None:
    """Train the cell, and leave word of how that ended.

    Raises:
        SystemExit: it failed; the reason is written down.
    """
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(int(os.environ[PARENT]),), daemon=True).start()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    from klab.harness.training.runtime.oom import is_out_of_memory
    from klab.harness.training.runtime.torch_settings import configure_torch

    run = Run.open(run_path)
    try:
        with user_code.searching(known=run.user_code()), configure_torch(threads):
            from klab.harness.engines.trl.settings import require_trl

            require_trl()
            from klab.harness.engines.trl.cell import train

            state = train(run, run.cell(cell), processes=size, stop=(control / STOP).exists, halved=halved)
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)
        write_failure(control, f"{rank:06d}", text, is_out_of_memory(error))
        os._exit(1)  # the others may wait for this rank for ever
    if rank == 0:
        files.replace(control / OUTCOME, json.dumps({"state": state}).encode())


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
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "1")
