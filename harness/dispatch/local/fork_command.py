"""How a fork server is started, and what it loads beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from klab.grid.libraries import needs_transformers
from klab.grid.user_code import python_command

SILENT = "silent"
"""Told to a fork server whose messages go nowhere before its first job names the run."""


def libraries_of(cells: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """What jobs of these cells use beside torch, for the fork server."""
    return ("transformers",) if any(map(needs_transformers, cells)) else ()


def fork_server_command(libraries: Sequence[str]) -> list[str]:
    return python_command("-m", "klab.harness.dispatch.local.fork_server", *libraries)
