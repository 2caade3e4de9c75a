"""How many threads numerical libraries use, and which kernels."""

from __future__ import annotations

import os

from klab.harness.store.kernels import fix_kernels


def limit_threads(threads: int) -> None:
    """Keep numerical libraries that are loaded from now on to this many threads and to this processor's kernels."""
    os.environ.update(environment(threads))


def environment(threads: int) -> dict[str, str]:
    """The environment of a process whose numerical libraries are kept to this many threads and to this processor's
    kernels."""
    fix_kernels()
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {"TOKENIZERS_PARALLELISM": "false", **os.environ, **dict.fromkeys(names, str(threads))}
