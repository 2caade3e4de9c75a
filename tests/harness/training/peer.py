"""A process that takes part in what the tests of `test_parallel.py` do together: `python peer.py RANK FOLDER`.

It waits for `FOLDER/<number>.json`, does its part as that rank, and waits for the next one; an empty one ends it.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import count
from pathlib import Path

import torch

from klab.harness.training.distributed.process_group import WorldLost
from klab.harness.training.distributed.rendezvous import join
from klab.harness.training.distributed.worker import follow


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
            world = join(rank, what["size"], folder / f"{number}.meeting", device=torch.device("cpu"))
            try:
                follow(what["run"], world)
            except WorldLost as lost:
                print(lost, file=sys.stderr)
            world.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
