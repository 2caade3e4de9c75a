"""`klab serve`: a live page of all runs in a folder, for a browser on this machine or at the end of an SSH tunnel."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from klab.grid import UserError
from klab.harness.cli.arguments import RUNS, JsonOption
from klab.harness.cli.text import say

PORT = 8765


def serve(
    runs: Annotated[
        Path, typer.Argument(metavar="[RUNS]", help="The folder that holds run folders, or one run.")
    ] = RUNS,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = PORT,
    host: Annotated[
        str, typer.Option("--host", help="The address to listen at; beyond this machine only with --private.")
    ] = "127.0.0.1",
    private: Annotated[
        bool, typer.Option("--private", help="Show nothing without a secret in the address; for shared machines.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a live page of runs: the state of every cell, curves that grow, completions as they come, the report.

    It only reads; Ctrl-C ends it, and the runs go on.
    """
    try:
        from klab.harness.serve.runs_folder import RunsFolder
        from klab.harness.serve.server import Address, LiveServer
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise UserError(
            f"needs the package {error.name}", key="klab serve", hint="pip install 'klab[serve]'"
        ) from error
    if not Address(host, port).is_loopback and not private:
        raise UserError(
            "other machines would reach this address",
            key="--host",
            value=host,
            hint="Add --private, or listen at 127.0.0.1 and come through an SSH tunnel.",
        )
    server = LiveServer(RunsFolder(runs), host, port, private)
    address = server.address
    if as_json:
        print(json.dumps({"url": address.url, "port": address.port, "tunnel": address.tunnel}), flush=True)
    else:
        say(f"{runs} is shown at {address.url}")
        say(f"From another machine: {address.tunnel}")
        say("and open the same address there. Ctrl-C ends the page; the runs go on.")
        sys.stdout.flush()
    with suppress(KeyboardInterrupt):
        server.run()
