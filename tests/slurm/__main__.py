"""The Slurm suite from nothing: `python -m tests.slurm [pytest's arguments]` installs, starts, tests, stops.

Everything runs with accounting (slurmdbd and MariaDB), then what accounting matters for runs again without it. Files or
tests among the arguments are run instead of all; `--accounting` or `--plain` leaves the other cluster out:

    python -m tests.slurm --accounting tests/slurm/test_trl.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.packages import install

WITHOUT_ACCOUNTING = "failing or killed_at or cancelled_from_outside or requeued or cancel_asks or forgot"
NOTHING_CHOSEN = 5
"""pytest's exit code where no test was left."""
ROOT = Path(__file__).parents[2]


def test(root: Path, accounting: bool, arguments: list[str]) -> int:
    """Run the suite on a fresh cluster below `root`; pytest's exit code."""
    cluster = Cluster(root, accounting=accounting)
    began = time.monotonic()
    try:
        cluster.start()
        print(
            f"=== Slurm {'with' if accounting else 'without'} accounting, started in {time.monotonic() - began:.1f} s"
        )
        environment = cluster.environment() | {
            "KLAB_TEST_SLURM": str(root),
            "KLAB_TEST_ACCOUNTING": str(int(accounting)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        chosen = [] if accounting else ["-k", WITHOUT_ACCOUNTING]
        named = any((ROOT / argument.partition("::")[0]).exists() for argument in arguments)
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "slurm", "--durations=5"]
        command += [*([] if named else ["tests/slurm"]), *chosen, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode
    finally:
        cluster.stop()


def main() -> int:
    began = time.monotonic()
    install()
    root = Path(tempfile.mkdtemp(prefix="klab-slurm-"))  # short: a socket's path has at most 107 characters
    clusters = {"accounts": "--accounting", "plain": "--plain"}
    asked = [name for name, flag in clusters.items() if flag in sys.argv] or list(clusters)
    arguments = [argument for argument in sys.argv[1:] if argument not in clusters.values()]
    codes = [test(root / name, name == "accounts", arguments) for name in asked]
    if set(codes) - {NOTHING_CHOSEN}:
        codes = [code for code in codes if code != NOTHING_CHOSEN]
    print(f"=== Slurm suite: {time.monotonic() - began:.0f} s")
    if any(codes):
        print(f"=== logs of the cluster: {root}/*/log")
    else:
        shutil.rmtree(root, ignore_errors=True)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
