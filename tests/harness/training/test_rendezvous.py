"""Who can take part in a job: the file that processes meet through, where rank 0 listens, and strangers."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from klab.harness.training.distributed import rendezvous as module
from klab.harness.training.distributed.process_group import ProcessGroupLost
from klab.harness.training.distributed.rendezvous import LOOPBACK, rendezvous

CPU = torch.device("cpu")


def lead(file: Path, visit: Any) -> None:
    """Rank 0 of two, whose other never comes; `visit` is called with what the file says while it waits."""
    seen = []

    def watch() -> None:
        if not seen:
            seen.append(json.loads(file.read_text()))
            visit(seen[0])

    rendezvous(0, 2, file, device=CPU, watch=watch)


class Seen(Exception):
    """The visit is over."""


def test_only_the_owner_can_read_the_secret_and_the_file_is_gone_afterwards(tmp_path: Path) -> None:
    def visit(found: dict[str, Any]) -> None:
        assert stat.S_IMODE((tmp_path / "meeting").stat().st_mode) == 0o600
        assert len(bytes.fromhex(found["secret"])) == 32
        raise Seen

    previous = os.umask(0)
    try:
        with pytest.raises(Seen):
            lead(tmp_path / "meeting", visit)
    finally:
        os.umask(previous)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/net")
def test_processes_of_one_machine_listen_on_the_loopback_only(tmp_path: Path) -> None:
    def visit(found: dict[str, Any]) -> None:
        assert found["address"] == LOOPBACK
        rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
        listening = "0A"
        where = [row[1] for row in rows if row[1].endswith(f":{found['port']:04X}") and row[3] == listening]
        assert where == [f"0100007F:{found['port']:04X}"]
        raise Seen

    with pytest.raises(Seen):
        lead(tmp_path / "meeting", visit)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names an interface of Linux")
def test_the_chosen_interface_is_the_one_that_is_listened_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with module._bind(socket.gethostname()) as listener:
        assert listener.getsockname()[0] == LOOPBACK
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    with pytest.raises(ProcessGroupLost, match="GLOO_SOCKET_IFNAME=none0"):
        module._bind(socket.gethostname())


def test_who_does_not_know_the_secret_cannot_join(tmp_path: Path) -> None:
    strangers = []

    def visit(found: dict[str, Any]) -> None:
        store = TCPStore(LOOPBACK, found["port"], is_master=False)
        store.set("process 1", "is here")
        strangers.append(store)

    with pytest.raises(ProcessGroupLost, match="process 1 of 2 does not know this job's secret"):
        lead(tmp_path / "meeting", visit)
    assert strangers
    assert not (tmp_path / "meeting").exists()
