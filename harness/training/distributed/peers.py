"""Who of the processes that train together has died: known within seconds, whatever they are waiting in.

A process that waits for a dead one inside NCCL hears nothing of it until a timeout, and then not who it was. Therefore
every process holds a connection to rank 0, on which nothing is sent while all is well. The system closes the
connections of a process that ends, and notices a node that is gone by keep-alive probes, which the other system answers
by itself: a process that is merely busy is never taken for dead. Rank 0 tells all others who it was.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

GRACE_SECONDS = 10.0
"""How long a process may take to end by itself once it knows; then it is ended, whatever it waits in."""

_PROBES = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds until the first keep-alive probe, between probes, and probes without an answer that mean a dead node."""

_LINE = 512
_BYE = b"bye\n"
_JOIN_SECONDS = 60.0


class PeerWatch:
    """One process's connections to the others, watched by a thread of its own.

    Attributes:
        lost: who is gone, in words; None while nobody is.
    """

    def __init__(self, rank: int, size: int, connections: dict[int, socket.socket], names: dict[int, str]) -> None:
        self.rank, self.size = rank, size
        self.lost: str | None = None
        self._connections, self._names = connections, names
        self._closing = False
        for connection in connections.values():
            _probe(connection)
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    @classmethod
    def lead(cls, size: int, listener: socket.socket, secret: bytes, watch: Callable[[], None]) -> PeerWatch:
        """Rank 0's: accept the others, each of which proves that it knows the secret.

        Args:
            watch: called while they are awaited; may raise.

        Raises:
            ConnectionError: where somebody does not know it.
            TimeoutError: where they do not come.
        """
        connections: dict[int, socket.socket] = {}
        names: dict[int, str] = {}
        listener.settimeout(0.2)
        waited = 0
        while len(connections) < size - 1:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                waited += 1
                watch()
                if waited > _JOIN_SECONDS / 0.2:
                    raise
                continue
            connection.settimeout(_JOIN_SECONDS)
            number, proof, name = _read_line(connection).split(" ", 2)
            if not hmac.compare_digest(proof, _proof(int(number), secret)):
                raise ConnectionError(f"what came as process {number} of {size} does not know this job's secret")
            connections[int(number)], names[int(number)] = connection, name
        listener.close()
        return cls(0, size, connections, names)

    @classmethod
    def join(cls, rank: int, size: int, address: str, port: int, secret: bytes) -> PeerWatch:
        """The watch of another process, which connects to rank 0."""
        connection = socket.create_connection((address, port), timeout=_JOIN_SECONDS)
        connection.sendall(f"{rank} {_proof(rank, secret)} {_name()}\n".encode())
        return cls(rank, size, {0: connection}, {0: f"at {address}"})

    def who_is_lost(self) -> str | None:
        """`lost`, for which a process that has noticed a closed connection elsewhere waits a moment."""
        deadline = time.monotonic() + 1.0
        while self.lost is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.lost

    def close(self, orderly: bool = True) -> None:
        """End the watch; unless it is `orderly`, the others take this process for gone."""
        self._closing = True
        for connection in self._connections.values():
            with suppress(OSError):
                connection.sendall(_BYE if orderly else b"")
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for number, connection in self._connections.items():
            connection.setblocking(True)
            selector.register(connection, selectors.EVENT_READ, number)
        while selector.get_map() and not self._closing:
            for key, _ in selector.select(1.0):
                connection, number = self._connections[key.data], key.data
                try:
                    line = connection.recv(_LINE)
                except OSError:
                    line = b""
                if self._closing:
                    return
                if line.startswith(_BYE):
                    selector.unregister(connection)
                elif line:
                    self._lose(line.decode().strip())
                    return
                else:
                    self._lose(f"process {number} of {self.size} ({self._names[number]}) is gone")
                    return

    def _lose(self, who: str) -> None:
        self.lost = who
        for connection in self._connections.values() if self.rank == 0 else ():
            with suppress(OSError):
                connection.sendall(f"{who}\n".encode())
        timer = threading.Timer(GRACE_SECONDS, self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        """End this process from outside of what its main thread waits in. Its cells go on from their checkpoints."""
        if not self._closing:
            print(f"klab: process {self.rank} of {self.size}: {self.lost}", file=sys.stderr, flush=True)
            os._exit(1)


def _probe(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES.items():
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _read_line(connection: socket.socket) -> str:
    """The first line that somebody sends, at most `_LINE` bytes of it."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _LINE:
        more = connection.recv(1)
        if not more:
            break
        line += more
    return line.decode(errors="replace").strip() if line.count(b" ") >= 2 else "-1 - -"


def _proof(rank: int, secret: bytes) -> str:
    return hashlib.blake2b(f"watch {rank}".encode(), key=secret).hexdigest()


def _name() -> str:
    """Where this process runs, in one line."""
    return f"{os.environ.get('SLURMD_NODENAME') or socket.gethostname()}, pid {os.getpid()}"
