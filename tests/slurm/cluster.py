"""A private Slurm cluster on one machine: four emulated nodes with two emulated GPUs each, with or without accounting.

    python -m tests.slurm.cluster install               # packages of Debian or Ubuntu; only this needs root or sudo
    python -m tests.slurm.cluster start --root /tmp/lab # again: starts what is missing, applies a changed configuration
    . /tmp/lab/env.sh                                   # SLURM_CONF: now sbatch, squeue and klab see this cluster
    python -m tests.slurm.cluster stop --root /tmp/lab --purge

Needs the standard library only. A process counts as ours when our root folder stands in its arguments or our
`slurm.conf` in its environment; no other process is ever signalled. Ports are chosen free at the first start and kept.
"""

from __future__ import annotations

import argparse
import getpass
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.slurm.configuration import NODES, configure, ports
from tests.slurm.packages import install, program
from tests.slurm.processes import descendants, facts, kill, living, processes, wait_for

NAMES = tuple(f"n{number}" for number in range(1, NODES + 1))
DATABASE_OPTIONS = (
    "--skip-name-resolve",
    "--bind-address=127.0.0.1",
    "--innodb-buffer-pool-size=64M",
    "--innodb-log-file-size=16M",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-lock-wait-timeout=900",
    "--performance-schema=OFF",
)


@dataclass
class Cluster:
    """One private cluster below `root`.

    `settings` are lines of slurm.conf; `user_signal` is whether preemption sends the job's own signal (submitit's USR2)
    or, as Slurm does by default, SIGTERM only.
    """

    root: Path
    accounting: bool = True
    user_signal: bool = True
    settings: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = self.root.absolute()
        self.conf = self.root / "etc" / "slurm.conf"

    def start(self) -> None:
        """Start whatever of the cluster does not run."""
        for name in ("etc", "log", "run", "state", "spool", "munge", *(f"spool/{node}" for node in NAMES)):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self._start_munge()
        before = self.conf.read_text() if self.conf.exists() else ""
        configure(self.root, accounting=self.accounting, user_signal=self.user_signal, settings=self.settings)
        if self.accounting:
            self._start_database()
            self._start_accounting()
        if before != self.conf.read_text():
            for name in ("slurmctld", *(f"slurmd.{node}" for node in NAMES)):
                self.stop_daemon(name)
        self.start_controller()
        for node in NAMES:
            if not self.alive(f"slurmd.{node}"):
                self._command("slurmd", "-N", node)
        self.tell("scontrol", "update", f"nodename=n[1-{NODES}]", "state=resume")  # undo drains of an earlier test
        wait_for("all nodes to be ready", self.ready, 60)

    def stop(self, *, purge: bool = False) -> None:
        """End our jobs first (a step without its controller hangs), then our daemons from the leaves up."""
        if self.alive("slurmctld"):
            self.tell("scancel", "--quiet", "--me")
            with suppress(TimeoutError):
                wait_for("jobs to end", lambda: not self.tell("squeue", "-h") and not any(self.steps()), 15)
        for step in list(self.steps()):
            for process in descendants(step):
                kill(process)
        for node in NAMES:
            self._signal(f"slurmd.{node}", signal.SIGTERM)
        for name in (*(f"slurmd.{node}" for node in NAMES), "slurmctld", "slurmdbd", "mariadbd", "munged"):
            self.stop_daemon(name)
        if purge:
            shutil.rmtree(self.root, ignore_errors=True)

    def stop_daemon(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """End one daemon ("slurmctld", "slurmdbd", "slurmd.n1", ...) and wait until it is gone."""
        pid = self.pid(name)
        if pid is not None:  # its pid file goes before it does
            kill(pid, how)
            try:
                wait_for(f"{name} to stop", lambda: not living(pid), 20)
            except TimeoutError:
                kill(pid)
        self._pid_file(name).unlink(missing_ok=True)

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers."""
        if not self.alive("slurmctld"):
            self._command("slurmctld")
        wait_for("slurmctld", lambda: " UP" in self.tell("scontrol", "ping"), 30)

    def remember(self, copy: Path) -> None:
        """Copy what the controller knows. It ends for it, by the signal with which it saves its state, and starts."""
        self.stop_daemon("slurmctld")
        shutil.copytree(self.root / "state", copy)
        self.start_controller()

    def forget(self, copy: Path) -> None:
        """The controller dies, and starts with what it knew then; the jobs submitted since are unknown to it."""
        self.stop_daemon("slurmctld", signal.SIGKILL)
        shutil.rmtree(self.root / "state")
        shutil.copytree(copy, self.root / "state")
        self.start_controller()

    def kill_node(self, node: str) -> None:
        """Power loss: the node's daemon, its step daemons and their processes die at once."""
        steps = list(self.steps(node))
        processes = set().union(*(descendants(step) for step in steps))
        self._signal(f"slurmd.{node}", signal.SIGKILL)
        for process in [*steps, *(processes - set(steps))]:  # nobody is left to report another's death
            kill(process)
        wait_for(f"{node} to die", lambda: not any(self.steps(node)) and not self.alive(f"slurmd.{node}"), 10)
        self.tell("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def revive_node(self, node: str) -> None:
        """Power back on."""
        if not self.alive(f"slurmd.{node}"):
            self._command("slurmd", "-N", node)
        self.tell("scontrol", "update", f"nodename={node}", "state=resume")
        wait_for(f"{node} to be ready", self.ready, 30)

    def environment(self) -> dict[str, str]:
        """The variables that make Slurm's commands speak to this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def tell(self, *command: str) -> str:
        """A command's output; "" where it failed."""
        try:
            done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=30)
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    def ready(self) -> bool:
        """Whether every node takes jobs."""
        words = [line.split()[-1] for line in self.tell("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t").splitlines()]
        return len(words) == NODES and all(word in ("idle", "mix", "alloc") for word in words)

    def steps(self, node: str | None = None) -> Iterator[int]:
        """Our step daemons, of one node or of all."""
        special = {"batch": "4294967291", "extern": "4294967292", "interactive": "4294967290"}
        for pid in processes():
            title = re.match(r"slurmstepd: \[(\d+)\.(\w+)\]", facts(pid, "cmdline").decode(errors="replace"))
            if title is None or not self._ours(pid):
                continue
            step = special.get(title[2], title[2])
            if node is None or (self.root / "spool" / node / f"{node}_{title[1]}.{step}").exists():
                yield pid

    def pid(self, name: str) -> int | None:
        """The daemon's process number, None where it does not run (a stale pid file may name another process)."""
        try:
            pid = int(self._pid_file(name).read_text())
        except (OSError, ValueError):
            return None
        return pid if self._ours(pid) else None

    def alive(self, name: str) -> bool:
        """Whether a daemon of ours runs."""
        return self.pid(name) is not None

    def _pid_file(self, name: str) -> Path:
        return self.root / "run" / f"{name}.pid"

    def _ours(self, pid: int) -> bool:
        marks = b"\0".join((b"", facts(pid, "cmdline"), facts(pid, "environ")))
        return (
            living(pid)
            and re.search(b"(=|\0SLURM_CONF=)" + re.escape(os.fsencode(self.root)) + b"/", marks) is not None
        )

    def _signal(self, name: str, number: signal.Signals) -> None:
        pid = self.pid(name)
        if pid is not None:
            kill(pid, number)

    def _command(self, name: str, *arguments: str) -> None:
        command = [program(name), *arguments]
        with (self.root / "log" / "start.log").open("ab") as log:
            code = subprocess.run(
                command, env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            ).returncode
        if code:
            raise SystemExit(f"{name} did not start; see {self.root / 'log'}")

    def _start_munge(self) -> None:
        folder, run = self.root / "munge", self.root / "run"
        folder.chmod(0o700)
        key = folder / "munge.key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(1024))
        if self.alive("munged"):
            return
        for stale in run.glob("munge.sock*"):
            stale.unlink()
        files = {
            "key-file": key,
            "socket": run / "munge.sock",
            "pid-file": self._pid_file("munged"),
            "log-file": folder / "munged.log",
            "seed-file": folder / "munged.seed",
        }
        self._command("munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
        wait_for("munged", lambda: bool(self.tell("munge", "-S", str(run / "munge.sock"), "-n")), 10)

    def _start_database(self) -> None:
        data, own = self.root / "mysql", ["--no-defaults", f"--user={getpass.getuser()}"]
        if not (data / "mysql").is_dir():
            data.mkdir(exist_ok=True)
            login = "--auth-root-authentication-method=normal"
            self._command("mariadb-install-db", *own, f"--datadir={data}", "--skip-test-db", login)
        if self.alive("mariadbd"):
            return
        local = self.root / "run" / "mysql.sock"
        places = [f"--datadir={data}", f"--socket={local}", f"--pid-file={self._pid_file('mariadbd')}"]
        # slurmdbd reaches the database through TCP only: it knows no other socket than the one compiled in
        command = [program("mariadbd"), *own, *places, f"--port={ports(self.root)['database']}", *DATABASE_OPTIONS]
        with (self.root / "log" / "mariadbd.log").open("ab") as log:
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        client = ("mariadb", "--no-defaults", "-u", "root", "-S", str(local), "-N", "-e")
        wait_for("mariadbd", lambda: self.tell(*client, "select 1") == "1", 30)
        account = "'slurm'@'127.0.0.1'"
        user = f"create user if not exists {account} identified by 'slurm'; grant all on slurm_acct_db.* to {account}"
        self.tell(*client, f"create database if not exists slurm_acct_db; {user}")

    def _start_accounting(self) -> None:
        if not self.alive("slurmdbd"):
            self._command("slurmdbd")
        listing = ("sacctmgr", "-n", "-P", "list", "cluster", "format=cluster")
        asked = {"env": self.environment(), "capture_output": True}
        wait_for("slurmdbd", lambda: subprocess.run(listing, **asked).returncode == 0, 30)  # type: ignore[call-overload]
        if "lab" not in self.tell(*listing).split():
            self.tell("sacctmgr", "-i", "-Q", "add", "cluster", "lab")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["install", "start", "stop", "kill-node", "revive-node"])
    parser.add_argument("node", nargs="?", choices=NAMES, help="for kill-node and revive-node")
    parser.add_argument("--root", type=Path, default=Path("/tmp/klab-slurm"), help="private folder of the cluster")
    parser.add_argument("--no-accounting", action="store_true", help="no slurmdbd, no MariaDB")
    parser.add_argument("--no-user-signal", action="store_true", help="preempt with SIGTERM only")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a line of slurm.conf")
    parser.add_argument("--purge", action="store_true", help="with stop: remove the root folder")
    given = parser.parse_args()
    settings = dict(line.split("=", 1) for line in given.set)
    cluster = Cluster(given.root, not given.no_accounting, not given.no_user_signal, settings)
    began = time.monotonic()
    if given.command in ("install", "start"):
        install(cluster.accounting)
    if given.command == "start":
        cluster.start()
    elif given.command == "stop":
        cluster.stop(purge=given.purge)
    elif given.command == "kill-node":
        cluster.kill_node(given.node)
    elif given.command == "revive-node":
        cluster.revive_node(given.node)
    print(f"{given.command}: {time.monotonic() - began:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
