"""`python -m klab.harness.exact.measure CACHE`: fingerprints of the objectives on standard input, into the cache.

Standard input is a JSON list of `[settings, on_policy]`; standard output counts, as `done/total` lines. A process of
its own, so that `klab plan` answers without torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from klab.grid import Objective
from klab.harness.exact.fingerprints import fingerprints
from klab.harness.store.machine import cores

_WORTH_PROCESSES = 1_000
"""From so many fingerprints on, the start of further processes costs less than they save."""


def main() -> None:
    """Measure what the cache does not know."""
    import torch

    torch.set_num_threads(1)
    wanted = {}
    for settings, on_policy in json.load(sys.stdin):
        objective = Objective(**settings)
        wanted[objective.canonical_text(on_policy), on_policy] = objective
    fingerprints(
        wanted,
        cache=Path(sys.argv[1]),
        workers=cores() if len(wanted) >= _WORTH_PROCESSES else 1,
        progress=lambda done, total: print(f"{done}/{total}", flush=True),
    )


if __name__ == "__main__":
    main()
