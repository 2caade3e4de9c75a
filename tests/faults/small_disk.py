"""Run a grid on file systems of growing size: `python -m tests.faults.small_disk GRID FOLDER`, in a mount namespace.

Every run is finished after its disk has grown, and copied to FOLDER.kept.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from klab.grid import load_grid
from klab.harness.store import Run
from tests.support.forked_runs import live, wait

SMALLEST, STEP, LARGEST = 32, 8, 400
"""KiB; pages have four. The smallest holds a run's folder and nothing of its cell."""


def main(grid_file: Path, folder: Path) -> int:
    kept = folder.with_name(f"{folder.name}.kept")
    kept.mkdir()
    grid = load_grid(grid_file)
    full, whole = 0, 0
    for size in range(SMALLEST, LARGEST, STEP):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", folder], check=True)
        try:
            run = Run.create(folder / "run", grid)
            ending = wait(live(run))
            full, whole = full + (ending != 0), whole + (ending == 0)
            subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
            if wait(live(run)) != 0:
                print(f"{size} KiB: the second life failed: {run.cell(run.cells[0]).error()}")
                return 1
            shutil.copytree(run.path, kept / f"{size}")
        finally:
            subprocess.run(["umount", folder], check=True)
        if whole == 2:
            break
    print(f"{full} disks too small, {whole} large enough; records lost: 0")
    return 0 if full and whole else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
