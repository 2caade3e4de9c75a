"""Processes of the comparison with TRL: one after the other on a core, or several at once; each on one thread."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
}
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
OUT_OF_MEMORY = ("out of memory", "memory does not suffice")
console = Console(width=150)


def say(text: str) -> None:
    console.print(f"[{time.strftime('%H:%M:%S')}] {text}", highlight=False)


class Failure(Exception):
    """A process has failed; the message is its command and the end of what it wrote."""

    def __init__(self, command: Sequence[str], written: str) -> None:
        super().__init__(f"{' '.join(command)}\n{written[-4000:]}")
        self.out_of_memory = any(words in written.lower() for words in OUT_OF_MEMORY)


def run(commands: Sequence[Sequence[str]], settings: Mapping[str, str], core: int | None = None) -> None:
    """Run commands at once, to their ends, on one core if that is said.

    Args:
        settings: environment variables beside `SETTINGS` and this process's own.

    Raises:
        Failure: one of them has failed; the others are ended.
    """
    pinned = ("taskset", "-c", str(core)) if core is not None else ()
    environment = {**os.environ, **SETTINGS, **settings}
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        running = {}
        for number, (command, file) in enumerate(zip(commands, files, strict=True)):
            running[number] = subprocess.Popen(
                [*pinned, *command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        try:
            while running:
                for number in [each for each, process in running.items() if process.poll() is not None]:
                    if running.pop(number).returncode:
                        files[number].seek(0)
                        raise Failure(commands[number], files[number].read())
                time.sleep(0.02)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
