"""Which kernels the math libraries compute with on this processor: chosen once, and recorded. Never imports torch.

MKL, by default, chooses among kernels by where in memory a matrix begins, so that a cell's numbers depend on its place
in a pack. Its conditional numerical reproducibility (oneMKL Developer Guide, "Obtaining numerically reproducible
results") ends that. MKL reads `MKL_CBWR` at its first product; whatever the user has set there stays (nothing, as in
`MKL_CBWR= klab …`, is MKL's default).
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress
from functools import cache
from pathlib import Path

MKL = "MKL_CBWR"
ATEN = "ATEN_CPU_CAPABILITY"
ONEDNN = "ONEDNN_MAX_CPU_ISA"
"""The variables that MKL, torch's own kernels and oneDNN (16-bit products) read; `kernels` speaks in their words."""

NATIVE = "KLAB_NATIVE"
"""Whether the stacked engine computes in compiled code; `0` says no. Recorded is the compiler, whose choice of
instructions decides the bits."""

COMPILERS = ("cc", "gcc", "clang")

_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AVX2 = {"avx2", "fma"}
_X86 = ("x86_64", "amd64")
_BRANCHES = {1: "OFF", 2: "AUTO", 3: "COMPATIBLE", 8: "SSE4_2", 9: "AVX", 10: "AVX2", 12: "AVX512", 14: "AVX512_E1"}
"""What MKL calls its branches (mkl_types.h)."""
_STRICT = 0x10000


def mkl_branch(vendor: str, flags: Collection[str]) -> str:
    """MKL's branch for a processor: on Intel's the widest that it has, on others `AUTO`.

    MKL honours AVX2 and AVX512 on Intel's processors alone; elsewhere it takes them for AUTO: kernels by processor, but
    with fixed block sizes and the same kernel for every alignment.
    """
    if vendor != "GenuineIntel":
        return "AUTO"
    if set(flags) >= _AVX512:
        return "AVX512"
    return "AVX2" if set(flags) >= _AVX2 else "COMPATIBLE"


def fix_kernels() -> None:
    """Set MKL's branch for this process and those that it starts. Has an effect until the first product of matrices."""
    if platform.machine().lower() in _X86:
        os.environ.setdefault(MKL, mkl_branch(*processor()))


def kernels() -> dict[str, str]:
    """What is in force where torch is loaded, else what will be: `MKL_CBWR`, `ATEN_CPU_CAPABILITY`, what is set of
    `ONEDNN_MAX_CPU_ISA`, and `KLAB_NATIVE`, as values that these variables take."""
    fix_kernels()  # the question itself makes MKL read its variable
    vendor, flags = processor()
    branch, capability = os.environ.get(MKL), os.environ.get(ATEN) or _capability(flags)
    if branch == "":
        branch = "OFF"
    elif branch is not None and vendor != "GenuineIntel":
        branch = _elsewhere(branch)
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "backends"):
        branch, capability = _mkl_answers(Path(torch.__file__ or "")), torch.backends.cpu.get_cpu_capability().lower()
    found = {MKL: branch, ATEN: capability, ONEDNN: os.environ.get(ONEDNN), NATIVE: compiler_version()}
    return {name: value for name, value in found.items() if value}


def compiler() -> str | None:
    """The C compiler of this machine for the stacked engine; None where it has none, or none is wanted."""
    if os.environ.get(NATIVE) == "0":
        return None
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def compiler_version() -> str:
    """That compiler's name and version, as `gcc-12.2.0`; `0` without one, or where what it built cannot be loaded."""
    library = sys.modules.get("klab.harness.policy.stacked.native.library")
    if library is not None and library.tried() and library.library() is None:
        return "0"
    found = compiler()
    return "0" if found is None else _version(found)


@cache
def _version(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "0"
    line = next(iter(done.stdout.splitlines()), "")
    number = re.search(r"clang version (\d[\d.]*)|(\d+(?:\.\d+)+)$", line.strip())
    return "0" if number is None else f"clang-{number[1]}" if number[1] else f"gcc-{number[2]}"


@cache
def processor() -> tuple[str, frozenset[str]]:
    """Vendor and feature flags as Linux names them; empty where it does not say."""
    vendor, flags = "", frozenset[str]()
    with suppress(OSError), Path("/proc/cpuinfo").open() as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == "vendor_id":
                vendor = value.strip()
            elif key.strip() == "flags":
                return vendor, frozenset(value.split())
    return vendor, flags


def _elsewhere(branch: str) -> str:
    """What MKL makes of a setting on a processor that is not Intel's."""
    name, comma, strict = branch.partition(",")
    return branch if name == "COMPATIBLE" else f"AUTO{comma}{strict}"


def _capability(flags: Collection[str]) -> str:
    if platform.machine().lower() not in _X86:
        return ""
    if set(flags) >= _AVX512 | _AVX2:
        return "avx512"
    return "avx2" if set(flags) >= _AVX2 else "default"


def _mkl_answers(torch: Path) -> str | None:
    """The branch that MKL computes with; None for a torch without MKL."""
    library = torch.parent / "lib" / "libtorch_cpu.so"
    try:
        ask = ctypes.CDLL(str(library)).mkl_serv_cbwr_get
    except (OSError, AttributeError):
        return None
    answer = int(ask(-1))
    name = _BRANCHES.get(answer & ~_STRICT, str(answer & ~_STRICT))
    return f"{name},STRICT" if answer & _STRICT else name
