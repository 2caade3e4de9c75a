"""One of the others of a `WorkerPool`: `python worker_process.py RANK FOLDER`.

It waits for `FOLDER/<number>.json`, does its part as that rank, and waits for the next one; an empty one ends it.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import count
from pathlib import Path

import torch

from klab.harness.store import Run
from klab.harness.training.distributed.process_group import ProcessGroupLost
from klab.harness.training.distributed.rendezvous import rendezvous
from klab.harness.training.distributed.worker import run_worker
from tests.support.gradients_of_cells import gradients


def main(rank: int, folder: Path) -> None:
    for number in count():
        file = folder / f"{number}.json"
        while not file.exists():
            time.sleep(0.02)
        what = json.loads(file.read_text())
        if not what:
            return
        sys.path[:0] = [path for path in what["path"] if path not in sys.path]
        if rank < what["size"]:
            process_group = rendezvous(rank, what["size"], folder / f"{number}.meeting", device=torch.device("cpu"))
            try:
                if what["gradients"]:
                    gradients(Run.open(what["run"]), process_group)
                else:
                    run_worker(what["run"], process_group)
            except ProcessGroupLost as lost:
                print(lost, file=sys.stderr)
            process_group.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
