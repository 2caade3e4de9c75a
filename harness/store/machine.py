"""Versions, commit and hardware of a run. Read without importing torch."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from klab.harness.store import cgroup
from klab.harness.store.kernels import kernels

_PACKAGES = ("klab", "torch", "transformers", "datasets", "numpy", "submitit", "pydantic", "safetensors")


def versions(libraries: Iterable[str] = ()) -> dict[str, str | None]:
    """Version of Python and of the packages that numbers depend on; None for those that are not installed.

    Args:
        libraries: optional ones that are used, see `klab.grid.libraries`.
    """
    packages = (*_PACKAGES, *libraries)
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


@cache
def _version(package: str) -> str | None:
    """Of an installed package, as it was when this process first asked."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit(folder: Path) -> str | None:
    """The git commit checked out in `folder`, with `+changes` where files differ from it; None outside a repository."""
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return f"{head}+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores available to this process, memory in GB, graphics processors, kernels of the math libraries."""
    return {
        "platform": platform.platform(),
        "processor": _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_gb": memory_gb(),
        "gpus": gpus(),
        "kernels": kernels(),
    }


def cores() -> int:
    """Processor cores that this process may use: those it may run on, or fewer where a quota allows less time."""
    try:
        here = len(os.sched_getaffinity(0))
    except AttributeError:
        here = os.cpu_count() or 1
    return min(here, cgroup.core_limit() or here)


def gpus() -> list[str]:
    """Names of NVIDIA devices, by the driver's own list; in a container without it, by their device files."""
    folder = Path("/proc/driver/nvidia/gpus")
    try:
        return [_field(entry / "information", "Model") or "NVIDIA" for entry in sorted(folder.iterdir())]
    except OSError:
        return ["NVIDIA" for _ in Path("/dev").glob("nvidia[0-9]*")]


def memory_gb() -> float | None:
    """Memory of this machine, or what a container's limit leaves of it, in GB of 2^30 bytes; None where the system does
    not say."""
    line = _field(Path("/proc/meminfo"), "MemTotal")
    known = [int(line.split()[0]) * 2**10 if line else None, cgroup.memory_limit()]
    found = [each for each in known if each is not None]
    return round(min(found) / 2**30, 1) if found else None


def _field(path: Path, name: str) -> str | None:
    try:
        with path.open() as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == name:
                    return value.strip()
    except OSError:
        pass
    return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()


def home_folder() -> Path:
    """The user's home; for a user who has none, a place where nothing is and nothing can be written."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull)


def cache_folder() -> Path:
    """Where what was computed once is kept: `$KLAB_CACHE`, else `klab` in the user's cache folder."""
    if given := os.environ.get("KLAB_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or home_folder() / ".cache") / "klab"
