"""Limits of control groups, read from trees as Docker, Kubernetes, Slurm and systemd lay them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from klab.harness.store import machine
from klab.harness.store.cgroup import core_limit, memory_limit

V1 = "11:memory:/kube/pod\n4:cpu,cpuacct:/kube/pod\n1:name=systemd:/kube/pod\n"
TREES = {
    "none": ("0::/user.slice\n", {"user.slice/cpu.max": "max 100000", "user.slice/memory.max": "max"}, None, None),
    "docker": ("0::/\n", {"cpu.max": "250000 100000", "memory.max": "1073741824"}, 3, 2**30),
    "above": (
        "0::/slurm/job/step\n",
        {"slurm/job/cpu.max": "400000 100000", "slurm/job/step/cpu.max": "max", "slurm/memory.max": "4096"},
        4,
        4096,
    ),
    "less than one": ("0::/\n", {"cpu.max": "20000 100000"}, 1, None),
    "v1": (
        V1,
        {
            "cpu,cpuacct/kube/pod/cpu.cfs_quota_us": "200000",
            "cpu,cpuacct/kube/pod/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "memory/kube/pod/memory.limit_in_bytes": "2147483648",
            "memory/memory.limit_in_bytes": "9223372036854771712",
        },
        2,
        2**31,
    ),
    "v1, the host's path, one controller": (
        V1,
        {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "50000"},
        3,
        None,
    ),
    "no cgroups": (None, {}, None, None),
}


@pytest.mark.parametrize("name", TREES)
def test_limits(tmp_path: Path, name: str) -> None:
    groups, files, cores, memory = TREES[name]
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for path, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    assert core_limit(tmp_path) == cores
    assert memory_limit(tmp_path) == memory


def test_jobs_are_counted_within_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    cores, memory = machine.cores(), machine.memory_gb()
    assert memory is not None
    monkeypatch.setattr("klab.harness.store.cgroup.core_limit", lambda: 1)
    monkeypatch.setattr("klab.harness.store.cgroup.memory_limit", lambda: 2**30)
    assert (machine.cores(), machine.memory_gb()) == (1, 1.0)
    monkeypatch.setattr("klab.harness.store.cgroup.core_limit", lambda: 2 * cores)
    monkeypatch.setattr("klab.harness.store.cgroup.memory_limit", lambda: 2**50)
    assert machine.cores() >= cores
