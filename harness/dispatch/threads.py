"""How many threads numerical libraries use, and which kernels."""

from __future__ import annotations

import os

from klab.harness.store.kernels import fix_kernels


def limit_threads(threads: int) -> None:
    """Keep numerical libraries that are loaded from now on to this many threads and to this processor's kernels."""
    fix_kernels()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
