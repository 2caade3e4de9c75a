"""A function that runs in a process of its own, call by call, with a time limit.

For code that is not ours: it may hang, crash, print, or eat memory without harm to the run. The process starts once
and stays; after a call that was overdue or fatal it is killed, and the next call starts another. Requests and replies
are lines of JSON over pipes, so nothing that the function returns is ever unpickled. It dies with the process that
started it, whatever it is doing and however that one ends: another process waits for the pipe between them to close.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from klab.grid import user_code
from klab.grid.errors import UserError
from klab.tasks.signature import Unfit
from klab.tasks.values import text_of

MEMORY_GB = 8.0
"""The usual limit of a worker's memory: what it may write to (its data segment), not what it maps."""

START_SECONDS = 120.0
"""For starting Python and importing the function's module, which may import torch."""

_CHILD = (
    "import sys, json; sys.path[:] = json.loads(sys.stdin.readline()); from klab.tasks.worker import serve; serve()"
)


class CallOverdue(Exception):
    """A call did not return within its time; the process is gone."""


class CallFailed(Exception):
    """The function raised, or its process ended; the message has the traceback or the exit status."""


class Worker:
    """Calls `function(*arguments)` in another process.

    Args:
        function: `package.module:function` or `./file.py:function`, found where this process finds it.
        seconds: limit of one call.
        memory_gb: limit of the memory that the process may write to; None for none.
        caller: `package.module:Class` whose instance, made from the function, is called instead of it.
        plain: the function's values are plain data, which arrive as they are: `{"plain": …}`.
        environment: variables of the process beside those of this one.
    """

    def __init__(
        self,
        function: str,
        seconds: float,
        memory_gb: float | None = MEMORY_GB,
        caller: str | None = None,
        plain: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.function, self.seconds, self.memory_gb, self.caller = function, seconds, memory_gb, caller
        self.plain, self.environment = plain, dict(environment or {})
        self.batched = False
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._stopping: weakref.finalize[..., Worker] | None = None

    def start(self) -> None:
        """Start the process and import the function; does nothing where that is done.

        Raises:
            UserError: there is no such file, module or function.
            CallFailed: the module raised while it was imported.
            CallOverdue: it took longer than `START_SECONDS`.
        """
        if self._process is not None:
            return
        self._buffer = b""
        location = user_code.locate(self.function, "task.reward")
        self._process = subprocess.Popen(
            user_code.python_command("-c", _CHILD),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **self.environment},
        )
        self._stopping = weakref.finalize(self, _kill, self._process)
        header = {
            "function": self.function,
            "folder": str(location.folder) if location.folder else None,
            "module": location.module,
            "attribute": location.attribute,
            "by_file": location.by_file,
            "memory_gb": self.memory_gb,
            "caller": self.caller,
            "plain": self.plain,
        }
        reply = self._asked([sys.path, header], START_SECONDS)
        if "ready" not in reply:
            self.stop()
        if "missing" in reply:
            raise UserError(
                reply["missing"],
                key="task.reward",
                value=self.function,
                allowed=reply.get("allowed", ()),
                hint=reply.get("hint"),
            )
        if "raised" in reply:
            raise CallFailed(f"{self.function} cannot be imported:\n{reply['raised']}")
        self.batched = bool(reply.get("batched"))

    def __call__(self, *arguments: object, seconds: float | None = None) -> dict[str, Any]:
        """The function's value for these arguments, which JSON can carry: `{"number": …}`, `{"score": {…}}`, or
        `{"type": …}` for the name of another type; with a `caller`, `{"values": […]}`, a list of such.

        Args:
            seconds: limit of this call; by default the worker's.

        Raises:
            CallOverdue, CallFailed: see there. The worker can be called again.
            UserError: the function cannot be called so.
        """
        self.start()
        reply = self._asked([arguments], self.seconds if seconds is None else seconds)
        if "unfit" in reply:
            raise UserError(reply["unfit"], key="task.reward", value=self.function)
        if "raised" in reply:
            raise CallFailed(f"{self.function} raised:\n{reply['raised']}")
        return reply

    def stop(self) -> None:
        """Kill the process, if there is one."""
        if self._stopping is not None:
            self._stopping()
        self._process = self._stopping = None

    def _asked(self, messages: Sequence[object], seconds: float) -> dict[str, Any]:
        """The answer to some messages. Whatever interrupts the wait ends the process: a late answer must not be taken
        for that to the next call."""
        try:
            self._send(messages)
            return self._receive(seconds)
        except BaseException:
            self.stop()
            raise

    def _send(self, messages: Sequence[object]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            for message in messages:
                self._process.stdin.write(json.dumps(message, default=text_of).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        out, until = self._process.stdout.fileno(), time.monotonic() + seconds
        poll = select.poll()
        poll.register(out, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poll.poll(1000 * max(0.0, until - time.monotonic())):
                raise CallOverdue(f"{self.function} gave no answer within {seconds:g} s")
            chunk = os.read(out, 65536)
            if not chunk:
                raise self._ended()
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _ended(self) -> CallFailed:
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        status = self._process.returncode
        how = f"signal {signal.Signals(-status).name}" if status and status < 0 else f"exit status {status}"
        return CallFailed(f"the process of {self.function} ended with {how}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def serve() -> None:
    """The other process: read requests, answer each, and end when the pipe is closed."""
    die_with_the_pipe()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the function prints goes to the log
    requests = map(json.loads, sys.stdin)
    header = next(requests)
    if header["memory_gb"] is not None:
        limit = int(header["memory_gb"] * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    called, reply = _found(header)
    if called is not None and header["caller"] is not None:
        called, reply = _wrapped(called, header["caller"])
    while True:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
        arguments = next(requests, None)
        if arguments is None:
            os._exit(0)
        try:
            value = called(*arguments)
            if header["plain"]:
                reply = {"plain": value}
            elif header["caller"] is None:
                reply = _described(value)
            else:
                reply = {"values": [_described(each) for each in value]}
        except Unfit as error:
            reply = {"unfit": str(error)}
        except BaseException:
            reply = {"raised": traceback.format_exc()}


def die_with_the_pipe() -> None:
    """Fork a process that kills this one, and what it has started, once the other end of standard input is gone.

    A thread could not: the function may hold the interpreter for as long as it likes.
    """
    group = os.getpid()  # a session's first process
    if os.fork():
        return
    for descriptor in (1, 2):
        os.close(descriptor)
    poll = select.poll()
    poll.register(0, 0)  # only its end is of interest
    poll.poll()
    os.killpg(group, signal.SIGKILL)


def _wrapped(function: Any, caller: str) -> tuple[Any, dict[str, Any]]:
    try:
        made = user_code.load(caller)(function)
    except Unfit as error:
        return None, {"missing": str(error)}
    return made, {"ready": True, "batched": made.batched}


def _found(header: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    folder = Path(header["folder"]) if header["folder"] else None
    location = user_code.Location(folder, header["module"], header["attribute"], header["by_file"])
    try:
        found = user_code.load_from(location, header["function"])
    except UserError as mistake:
        return None, {"missing": mistake.problem, "allowed": mistake.allowed, "hint": mistake.hint}
    except BaseException:
        return None, {"raised": traceback.format_exc()}
    if not callable(found):
        return None, {"missing": "is not a function", "allowed": (), "hint": None}
    return found, {"ready": True}


def _described(value: object) -> dict[str, Any]:
    from klab.tasks.task import Score

    if isinstance(value, Score):
        parts = {str(name): _number(part) for name, part in value.parts.items()}
        score = {"reward": _number(value.reward), "correct": bool(value.correct), "parts": parts}
        if None in (score["reward"], *parts.values()):
            return {"type": "a tasks.Score that holds something other than numbers"}
        return {"score": score}
    number = _number(value)
    return {"type": type(value).__name__} if number is None else {"number": number}


def _number(value: object) -> float | None:
    """Anything that is one number (also of numpy or torch); None for text, collections and the rest."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
