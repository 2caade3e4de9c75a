"""The compiled part of the stacked engine: built once per processor by the machine's C compiler, kept in klab's cache.

Where there is no compiler, everything is computed by `batched_layers.py`, operation by operation; `KLAB_NATIVE=0` asks
for that. Which of the two computed is recorded with the versions of an attempt.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from klab.harness.store.kernels import ATEN, compiler, compiler_version, processor
from klab.harness.store.machine import cache_folder

SOURCES = ("transformer.c", "products.h", "tree_attention.h", "row_operations.h")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
SAME_BITS = ("-mtune=generic", "-fno-tree-vectorize")
"""Vectors are written out in the sources: what compilers would choose by the processor changes the order of sums."""
NARROWER = {"avx2": ("-march=x86-64-v3",), "default": ("-march=x86-64",)}
"""What `ATEN_CPU_CAPABILITY`, which narrows torch's own kernels, asks of these."""

_WORD, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: Mapping[str, tuple[tuple[type, ...], type | None]] = {
    "layer_numbers": ((_ADDRESS, _WORD, _WORD), _WORD),
    "backward_numbers": ((_ADDRESS, _WORD), _WORD),
    "integers": ((_ADDRESS, _WORD), _WORD),
    "forward": ((_ADDRESS,) * 5, None),
    "backward": ((_ADDRESS,) * 8, None),
}


@cache
def library() -> ctypes.CDLL | None:
    """The library of this process, built first where it is not there yet; None where there is none to be had."""
    file = build()
    if file is None:
        return None
    try:
        functions = ctypes.CDLL(str(file))
    except OSError:
        return None
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = arguments, result
    return functions


def tried() -> bool:
    """Whether this process has asked for it."""
    return library.cache_info().currsize > 0


def build() -> Path | None:
    """The library's file, compiled now unless klab's cache has it; None without a compiler that can, or if none is
    wanted."""
    program = compiler()
    if program is None:
        return None
    flags = [*FLAGS, *SAME_BITS, *NARROWER.get(os.environ.get(ATEN, ""), ("-march=native",))]
    here = Path(__file__).parent
    _, features = processor()
    digest = hashlib.sha256()
    for part in (
        program,
        compiler_version(),
        *flags,
        *sorted(features),
        *((here / name).read_text() for name in SOURCES),
    ):
        digest.update(part.encode() + b"\0")
    folder = cache_folder() / "native"
    target = folder / f"{digest.hexdigest()[:20]}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "library.so"
            command = [program, *flags, "-o", str(built), str(here / SOURCES[0]), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            os.replace(built, target)
    except (OSError, subprocess.SubprocessError):
        return None
    return target
