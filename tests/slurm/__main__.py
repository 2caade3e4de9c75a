"""The Slurm suite from nothing: `python -m tests.slurm [pytest's arguments]` installs, starts, tests, stops.

Everything runs with accounting (slurmdbd and MariaDB), then what accounting matters for runs again without it.
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

WITHOUT_ACCOUNTING = "failing or killed_at or cancelled_from_outside or requeued or cancel_asks"
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
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "slurm", "--durations=5", "tests/slurm"]
        return subprocess.run([*command, *chosen, *arguments], cwd=ROOT, env=environment).returncode
    finally:
        cluster.stop()


def main() -> int:
    began = time.monotonic()
    install()
    root = Path(tempfile.mkdtemp(prefix="klab-slurm-"))  # short: a socket's path has at most 107 characters
    codes = [test(root / name, name == "accounts", sys.argv[1:]) for name in ("accounts", "plain")]
    print(f"=== Slurm suite: {time.monotonic() - began:.0f} s")
    if any(codes):
        print(f"=== logs of the cluster: {root}/*/log")
    else:
        shutil.rmtree(root, ignore_errors=True)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
