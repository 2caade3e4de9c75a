"""One of several processes that crosscheck a cell: `torchrun … trl_ranks.py GRID`; the first prints what it found."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

import torch

from klab.grid import load_grid
from klab.harness.engines.trl.crosscheck import crosscheck

if __name__ == "__main__":
    torch.set_num_threads(1)
    grid = load_grid(sys.argv[1])
    for cell in grid.cells:
        found = crosscheck(cell, 3, "float64", int(os.environ["WORLD_SIZE"]))
        if found:
            print(json.dumps([asdict(each) for each in found]), flush=True)
