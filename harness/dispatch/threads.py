"""How many threads numerical libraries use."""

from __future__ import annotations

import os


def limit_threads(threads: int) -> None:
    """Keep numerical libraries that are loaded from now on to this many threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
