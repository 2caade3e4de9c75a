"""A large run's report: `python -m tests.benchmarks.report [CELLS SEEDS]` (1,000 configurations of 5 seeds by default).

Writes a synthetic run through the store, then reads its frames (fresh and cached) and renders page and tables in a
process of its own, on one thread. Printed are seconds of wall clock and of processor time, the peak of memory and the
size of the page.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.reports.synthetic import write_large_run

_WORK = {
    "frames, fresh": "from klab.reports import load_run; load_run(sys.argv[1])",
    "frames, cached": "from klab.reports import load_run; load_run(sys.argv[1])",
    "page and tables": "from klab.reports import render; print(render(sys.argv[1], figures=False).stat().st_size)",
}
_FRAME = """
import resource, sys, time
start = time.perf_counter()
{work}
used = resource.getrusage(resource.RUSAGE_SELF)
print(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""


def main(cells: int = 1000, seeds: int = 5) -> None:
    """Print one line per kind of work."""
    with tempfile.TemporaryDirectory(prefix="klab-bench-") as folder:
        began = time.perf_counter()
        run = write_large_run(Path(folder) / "large", cells, seeds)
        made = time.perf_counter() - began
        table = Table("work", "seconds", "processor", "peak MB", "page MB", box=None, title_justify="left")
        table.title = f"{len(run.cells)} cells, 100 updates each (written in {made:.0f} s)"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        for name, work in _WORK.items():
            command = [sys.executable, "-c", _FRAME.format(work=work), str(run.path)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            *size, last = done.stdout.strip().splitlines()
            wall, processor, peak = map(float, last.split())
            page = f"{int(size[0]) / 1e6:.1f}" if size else ""
            table.add_row(name, f"{wall:.1f}", f"{processor:.1f}", f"{peak:.0f}", page)
        Console().print(table)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
