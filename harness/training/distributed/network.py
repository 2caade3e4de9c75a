"""Where the other nodes of a job reach this one, by the interface that `GLOO_SOCKET_IFNAME` names or by host name, and
how long processes wait for one another."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klab.harness.store import Run

MINUTES_VARIABLE = "KLAB_COLLECTIVE_MINUTES"
"""Where a Slurm job's script tells its processes `resources.collective_minutes`, whatever it comes from."""

_SIOCGIFADDR = 0x8915
"""Linux' request for an interface's IPv4 address (ioctls.h)."""


def collective_minutes(run: Run) -> float:
    """How long the processes of a job may wait for one another."""
    return float(os.environ.get(MINUTES_VARIABLE) or run.resources.collective_minutes)


def own_address() -> str:
    """The address that the interface has which `GLOO_SOCKET_IFNAME` names, or else this host's name, IPv4 before IPv6.

    Raises:
        OSError: there is no such interface, or it has no address, or the host's name has none.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface and sys.platform == "linux":
        return interface_address(interface)
    return str(socket_address(socket.gethostname())[1][0])


def socket_address(host: str) -> tuple[socket.AddressFamily, Any]:
    """Family and address of a host, IPv4 before IPv6, with a port that is to be chosen."""
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    family, _, _, _, where = min(found, key=lambda each: each[0] != socket.AF_INET)
    return family, where


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface.

    Raises:
        OSError: there is no such interface, or it has none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            raise OSError(error.errno, f"GLOO_SOCKET_IFNAME={name}: {error.strerror}") from error
    return socket.inet_ntoa(answer[20:24])
