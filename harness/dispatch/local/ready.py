"""A controller that is started before its run: while `klab launch` checks a grid, it imports what jobs need.

Run as `python -m klab.harness.dispatch.local.ready [transformers]`: the libraries are those of its fork server, which
is started before anything else is imported. The run folder comes on standard input, once there is one; where that ends
without it, because the grid has a mistake or the launch was interrupted, this process and its server end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from klab.grid.user_code import python_command
from klab.harness.dispatch.local.fork_command import SILENT, fork_server_command, libraries_of
from klab.harness.dispatch.threads import environment


class ReadyController:
    """The launch's end of such a process.

    Args:
        cells: settings of the cells that are about to be launched.
        threads: of each job's processes.
    """

    def __init__(self, cells: Iterable[Mapping[str, Any]], threads: int) -> None:
        self._process = subprocess.Popen(
            python_command("-m", "klab.harness.dispatch.local.ready", *libraries_of(cells)),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=environment(threads),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, run_path: Path) -> subprocess.Popen[bytes] | None:
        """Let it control the run in this folder; None where it has ended."""
        process = self._process
        if process.poll() is not None:
            return None
        assert process.stdin is not None
        try:
            process.stdin.write(f"{run_path}\n".encode())
            process.stdin.close()
        except BrokenPipeError:
            return None
        return process

    def end(self) -> None:
        """It is not needed, unless it was told its run."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


def main() -> None:
    """Start the fork server, wait for the run folder, and work as its controller."""
    server = subprocess.Popen(
        fork_server_command([*sys.argv[1:], SILENT]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    from klab.grid import UserError
    from klab.harness.dispatch.local.controller import run_controller
    from klab.harness.dispatch.local.queue_files import log_path
    from klab.harness.store import Run

    path = sys.stdin.readline().rstrip("\n")
    if not path:
        server.kill()
        server.wait()
        return
    try:
        with log_path(Run.open(path)).open("ab") as log:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
        run_controller(path, server)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
