"""Limits that a container or a batch system puts on this process through Linux control groups (cgroups v1 and v2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED_BYTES = 2**60
"""cgroups v1 write a huge number where there is no limit."""


def core_limit(root: Path = Path("/")) -> int | None:
    """Processor cores that the quotas above this process allow, a part of one as a whole; None without a quota.

    Args:
        root: the folder that `proc` and `sys` are in.
    """
    shares = []
    for folder in _folders(root, "cpu"):
        quota, period = _words(folder / "cpu.max"), "100000"
        if quota:
            period = quota[1] if len(quota) > 1 else period
        else:
            quota, (period, *_) = _words(folder / "cpu.cfs_quota_us"), [*_words(folder / "cpu.cfs_period_us"), period]
        if quota and quota[0].isdecimal() and period.isdecimal() and int(period):
            shares.append(int(quota[0]) / int(period))
    return max(1, math.ceil(min(shares))) if shares else None


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes of memory that the limits above this process allow; None without a limit."""
    limits = []
    for folder in _folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += [int(word) for word in _words(folder / name) if word.isdecimal()]
    return min((limit for limit in limits if limit < _UNLIMITED_BYTES), default=None)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The group of this process under a controller and all groups above it, in either version's tree.

    Inside a container the tree may begin at the container's own group, below which the host's path leads nowhere.
    """
    trees = root / "sys" / "fs" / "cgroup"
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tree = trees / controllers if controllers else trees
        if controllers and not tree.is_dir():
            tree = trees / controller
        group = tree / path.lstrip("/")
        yield from (each for each in (group, *group.parents) if each == tree or tree in each.parents)


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
