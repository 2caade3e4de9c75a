"""A server on this machine: its socket, its address, and how to reach it from elsewhere."""

from __future__ import annotations

import getpass
import ipaddress
import secrets
import socket
from dataclasses import dataclass

import uvicorn

from klab.grid import UserError
from klab.harness.serve.app import app
from klab.harness.serve.guard import LOOPBACK
from klab.harness.serve.runs_folder import RunsFolder


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens.

    Attributes:
        secret: the first part of every address, without which nothing is shown; "" for none.
    """

    host: str
    port: int
    secret: str = ""

    @property
    def url(self) -> str:
        """For a browser on this machine."""
        name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        name = f"[{name}]" if ":" in name and not name.startswith("[") else name
        return f"http://{name}:{self.port}/{f'{self.secret}/' if self.secret else ''}"

    @property
    def tunnel(self) -> str:
        """The command for a terminal elsewhere, after which `url` works in a browser there."""
        name = (
            "127.0.0.1"
            if self.host in ("0.0.0.0", "localhost")
            else f"[{self.host}]"
            if ":" in self.host
            else self.host
        )
        try:
            user = f"{getpass.getuser()}@"
        except (OSError, KeyError):  # a user without a name, as in some containers
            user = ""
        return f"ssh -N -L {self.port}:{name}:{self.port} {user}{socket.gethostname()}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class LiveServer:
    """A server that shows a runs folder. Its socket is open from the beginning, so that its port is known.

    Args:
        folder: what it shows.
        host: the address to listen at; where it is not a loopback address, every address begins with a secret.
        port: 0 for any that is free.
        private: every address begins with a secret: other users of this machine can reach the port, too.

    Raises:
        UserError: the address cannot be had.
    """

    def __init__(self, folder: RunsFolder, host: str = "127.0.0.1", port: int = 0, private: bool = False) -> None:
        self._socket = _listening(host, port)
        bound = Address(host, int(self._socket.getsockname()[1]))
        secret = secrets.token_urlsafe(18) if private or not bound.is_loopback else ""
        self.address = Address(host, bound.port, secret)
        names = LOOPBACK if bound.is_loopback else (*LOOPBACK, host, socket.gethostname(), socket.getfqdn())
        served = app(folder, {*names, *((host,) if host else ())}, not bound.is_loopback, secret)
        config = uvicorn.Config(
            served,
            lifespan="off",
            ws="none",
            http="h11",
            loop="asyncio",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=200,
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve until Ctrl-C, or until `stop`."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Let `run` end, in another thread."""
        self._server.should_exit = True


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)
    except (OSError, OverflowError) as error:
        found.close()
        hint = "--port 0 takes any that is free." if port else "--host is an address of this machine."
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"cannot listen there: {reason}", key="--port", value=f"{host}:{port}", hint=hint) from None
    return found
