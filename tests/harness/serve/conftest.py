"""A real server on a port of its own, asked over HTTP as a browser would ask it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from klab.harness.serve.runs_folder import RunsFolder
from klab.harness.serve.server import LiveServer
from klab.harness.store import Run
from tests.reports.synthetic import write_run

STUDY = """
name: little
description: Which estimator?
task: {name: addition, digits: 2}
training: {updates: 6, updates_per_rollout: 2, evaluate_every: 3}
objective: {algorithm: grpo, beta: 0.05}
axes: {estimator: [k1, k2, k3], training.lr: [0.1, 0.2]}
seeds: 2
"""


@dataclass(frozen=True)
class Reply:
    """What the server said."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def data(self) -> Any:
        return json.loads(self.body)


class Client:
    """Asks a server; every request on a connection of its own."""

    def __init__(self, server: LiveServer) -> None:
        self.server = server
        self.port = server.address.port

    def ask(self, path: str, method: str = "GET", headers: Mapping[str, str | None] | None = None) -> Reply:
        """The reply to a request for exactly this path; a header of None is not sent."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"Host": f"127.0.0.1:{self.port}", **(headers or {})}
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        reply = Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        connection.close()
        return reply

    def get(self, path: str) -> Any:
        """The data at this path."""
        reply = self.ask(f"/api/{path}")
        assert reply.status == 200, reply.body
        return reply.data


@pytest.fixture
def serve() -> Iterator[Callable[..., Client]]:
    """`serve(folder, …)` starts a server that looks at every request; all are stopped at the end."""
    started: list[tuple[LiveServer, threading.Thread]] = []

    def start(folder: Path, **options: Any) -> Client:
        server = LiveServer(RunsFolder(folder, every=0.0), **options)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        started.append((server, thread))
        return Client(server)

    yield start
    for server, thread in started:
        server.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Twelve finished cells, in a runs folder of their own."""
    return write_run(tmp_path / "runs" / "little", STUDY)


@pytest.fixture
def client(run: Run, serve: Callable[..., Client]) -> Client:
    """A server that shows `run`."""
    return serve(run.path.parent)
