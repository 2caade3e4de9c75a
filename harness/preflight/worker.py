"""The process that checks a grid: `python -m klab.harness.preflight.worker`, started by `Preflight`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from klab.grid import Cell
from klab.harness.preflight.checks import check, check_evaluations
from klab.harness.preflight.memory import MemoryEstimate


def main() -> None:
    """Read the request, check, and write what is found; what checked code prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    cells = [Cell.from_resolved(each) for each in request["cells"]]
    file = Path(request["file"])
    for found in (*check_evaluations(request.get("evaluate"), file), *check(cells, file)):
        kind = "memory" if isinstance(found, MemoryEstimate) else "finding"
        print(json.dumps({kind: asdict(found)}), file=answers, flush=True)
    answers.flush()
    os._exit(0)  # whatever threads the checked code has started


if __name__ == "__main__":
    main()
