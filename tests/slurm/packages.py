"""Slurm from the packages of Debian or Ubuntu."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "procps")
ACCOUNTING_PACKAGES = ("slurmdbd", "mariadb-server-core", "mariadb-client-core")


def install(accounting: bool = True) -> None:
    """Install the missing packages, without letting them start services of their own."""
    wanted = PACKAGES + (ACCOUNTING_PACKAGES if accounting else ())
    missing = [name for name in wanted if not _installed(name)]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise SystemExit(f"no apt-get here; install these by hand: {' '.join(missing)}")
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        subprocess.run([*sudo, "tee", policy], input=b"#!/bin/sh\nexit 101\n", stdout=subprocess.DEVNULL, check=True)
        subprocess.run([*sudo, "chmod", "+x", policy], check=True)
    apt = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    try:
        subprocess.run([*apt, "update"], check=True)
        command = [*apt, "install", "-y", "--no-install-recommends", *missing]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    finally:
        if made:
            subprocess.run([*sudo, "rm", "-f", policy], check=True)


def slurm_version() -> tuple[int, int]:
    """Release of the installed slurmd, e.g. (22, 5)."""
    text = subprocess.run([program("slurmd"), "-V"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)", text)
    if found is None:
        raise SystemExit(f"cannot read Slurm's version from {text!r}")
    return int(found[1]), int(found[2])


def program(name: str) -> str:
    """Where a daemon is installed."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise SystemExit(f"{name} is not installed: `python -m tests.slurm.cluster install`")
    return path


def _installed(package: str) -> bool:
    asked = subprocess.run(["dpkg-query", "-W", "-f", "${Status}", package], capture_output=True, text=True)
    return "ok installed" in asked.stdout
