"""The private cluster's configuration files. Why each unusual line is there stands beside it."""

from __future__ import annotations

import getpass
import json
import os
import socket
from pathlib import Path

from tests.slurm.packages import slurm_version

NODES, CPUS, GPUS, MEMORY_MB = 4, 16, 2, 16000
PARTITIONS = (
    "PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF",
    "PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=10",
    "PartitionName=high PriorityTier=20 PreemptMode=OFF",
)

_SCHEDULING = "bf_interval=1,bf_continue,sched_interval=2,sched_min_interval=10000,batch_sched_delay=0"


def configure(root: Path, *, accounting: bool, user_signal: bool, settings: dict[str, str]) -> None:
    """Write slurm.conf, gres.conf, cgroup.conf, slurmdbd.conf and env.sh below `root`.

    `settings` are lines of slurm.conf, which replace those of the same name.
    """
    etc, port, version = root / "etc", ports(root), slurm_version()
    # the gpu plugin wants an existing character device for each GPU, and never opens it
    (etc / "gres.conf").write_text(f"AutoDetect=off\nNodeName=n[1-{NODES}] Name=gpu File=/dev/null,/dev/zero\n")
    # slurmd loads a cgroup plugin whatever the rest says, and dies where none is mounted
    (etc / "cgroup.conf").write_text(f"CgroupPlugin={'disabled' if version >= (23, 11) else 'cgroup/v1'}\n")
    secret = etc / "slurmdbd.conf"
    secret.touch(mode=0o600)
    secret.write_text(_lines(_accounting_daemon(root, port)))
    controller = _controller(root, port)
    if user_signal:  # the option moved between releases, and an unknown one is fatal
        old = version < (23, 2)
        name, word = (
            ("SlurmctldParameters", "preempt_send_user_signal") if old else ("PreemptParameters", "send_user_signal")
        )
        controller[name] = word
    controller |= _accounting(root, port) if accounting else {"AccountingStorageType": "accounting_storage/none"}
    last = port["node"] + NODES - 1
    machine = (
        f"NodeName=n[1-{NODES}] NodeHostname={_host()} NodeAddr=127.0.0.1 Port={port['node']}-{last} CPUs={CPUS}"
        f" RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN"
    )
    partitions = [f"{line} Nodes=n[1-{NODES}] MaxTime=INFINITE DefaultTime=60 State=UP" for line in PARTITIONS]
    (etc / "slurm.conf").write_text(_lines(controller | settings) + "\n".join([machine, *partitions]) + "\n")
    (root / "env.sh").write_text(f"export SLURM_CONF={etc / 'slurm.conf'}\n")


def ports(root: Path) -> dict[str, int]:
    """Free ports, chosen once: controller, accounting, database, and node, the first of one for each node."""
    file = root / "etc" / "ports.json"
    if not file.exists():
        file.write_text(json.dumps(_free_ports()))
    stored: dict[str, int] = json.loads(file.read_text())
    return stored


def _controller(root: Path, port: dict[str, int]) -> dict[str, str]:
    user, log, run = getpass.getuser(), root / "log", root / "run"
    return {
        "ClusterName": "lab",
        "SlurmctldHost": f"{_host()}(127.0.0.1)",
        "SlurmctldPort": str(port["controller"]),
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        "AuthInfo": f"socket={run / 'munge.sock'},cred_expire=5",  # also the wait before a requeued job may start again
        "StateSaveLocation": str(root / "state"),
        "SlurmdSpoolDir": str(root / "spool" / "%n"),
        "SlurmctldPidFile": str(run / "slurmctld.pid"),
        "SlurmdPidFile": str(run / "slurmd.%n.pid"),
        "SlurmctldLogFile": str(log / "slurmctld.log"),
        "SlurmdLogFile": str(log / "slurmd.%n.log"),
        "MpiDefault": "none",
        "SwitchType": "switch/none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "PropagateResourceLimits": "NONE",
        "SlurmdParameters": "config_overrides",  # believe the declared CPUs
        "ReturnToService": "2",
        # time scales of a test
        "KillWait": "2",
        "MinJobAge": "3600",
        "MaxJobCount": "20000",
        "MaxArraySize": "4001",
        "InactiveLimit": "0",
        "SlurmctldTimeout": "30",
        "SlurmdTimeout": "15",
        "MessageTimeout": "10",
        "BatchStartTimeout": "10",
        "CompleteWait": "0",
        "JobRequeue": "1",
        # scheduling
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": _SCHEDULING,
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "PriorityType": "priority/basic",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "PreemptExemptTime": "00:00:00",
        "GresTypes": "gpu",
        "JobAcctGatherType": "jobacct_gather/none",
    }


def _accounting(root: Path, port: dict[str, int]) -> dict[str, str]:
    return {
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": "127.0.0.1",
        "AccountingStoragePort": str(port["accounting"]),
        "AccountingStoragePass": str(root / "run" / "munge.sock"),
        "AccountingStorageTRES": "gres/gpu",
    }


def _accounting_daemon(root: Path, port: dict[str, int]) -> dict[str, str]:
    return {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={root / 'run' / 'munge.sock'}",
        "DbdHost": _host(),
        "DbdAddr": "127.0.0.1",
        "DbdPort": str(port["accounting"]),
        "SlurmUser": getpass.getuser(),
        "LogFile": str(root / "log" / "slurmdbd.log"),
        "PidFile": str(root / "run" / "slurmdbd.pid"),
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "127.0.0.1",
        "StoragePort": str(port["database"]),
        "StorageUser": "slurm",
        "StoragePass": "slurm",
        "StorageLoc": "slurm_acct_db",
    }


def _free_ports() -> dict[str, int]:
    wanted = 3 + NODES
    for first in range(16800 + os.getpid() % 97 * 10, 32000, wanted):
        if all(_free(port) for port in range(first, first + wanted)):
            return {"controller": first, "accounting": first + 1, "database": first + 2, "node": first + 3}
    raise SystemExit("no free ports between 16800 and 32000")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _lines(settings: dict[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in settings.items())
