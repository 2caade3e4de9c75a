"""Which kernels a process computes with: chosen by the processor, kept where the user chose, told as they are."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from klab.harness.store.kernels import ATEN, MKL, fix_kernels, kernels, mkl_branch, processor

X86 = platform.machine().lower() in ("x86_64", "amd64")
SKYLAKE = ["fma", "avx", "avx2", "avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"]
WITH_MKL = X86 and torch.backends.mkl.is_available()
TELL = "import json; from klab.harness.store.kernels import kernels; print(json.dumps(kernels()))"


def told(program: str, **environment: str) -> dict[str, str]:
    """What a fresh process says of its kernels."""
    clean = {name: value for name, value in os.environ.items() if name not in (MKL, ATEN)}
    done = subprocess.run([sys.executable, "-c", program], env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("vendor", "flags", "branch"),
    [
        ("GenuineIntel", SKYLAKE, "AVX512"),
        ("GenuineIntel", [flag for flag in SKYLAKE if flag != "avx512vl"], "AVX2"),  # Knights Landing
        ("GenuineIntel", ["sse4_2", "avx"], "COMPATIBLE"),
        ("AuthenticAMD", SKYLAKE, "AUTO"),
        ("", [], "AUTO"),
    ],
)
def test_the_branch_is_the_widest_that_mkl_has_for_a_processor(vendor: str, flags: list[str], branch: str) -> None:
    assert mkl_branch(vendor, flags) == branch


@pytest.mark.skipif(not X86, reason="MKL is for x86")
def test_the_users_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MKL, "COMPATIBLE")
    fix_kernels()
    assert os.environ[MKL] == "COMPATIBLE"
    monkeypatch.delenv(MKL)
    fix_kernels()
    assert os.environ[MKL] == mkl_branch(*processor())


@pytest.mark.skipif(not WITH_MKL, reason="this torch is built without MKL")
@pytest.mark.parametrize("branch", [None, "", "COMPATIBLE", "AVX2,STRICT"])
def test_what_is_foretold_without_torch_is_what_mkl_says_with_it(branch: str | None) -> None:
    environment = {} if branch is None else {MKL: branch}
    foretold = told(f"{TELL}; import sys; sys.exit('torch' in sys.modules)", **environment)
    assert MKL in foretold
    assert foretold == told(f"import torch; {TELL}", **environment)


@pytest.mark.skipif(not WITH_MKL, reason="this torch is built without MKL")
def test_a_process_whose_torch_has_computed_already_is_recorded_as_it_is() -> None:
    late = f"import torch; torch.ones(64, 64) @ torch.ones(64, 64); {TELL}"
    assert told(late)[MKL] == "OFF"
    assert told(late, **{MKL: "COMPATIBLE"})[MKL] == "COMPATIBLE"


@pytest.mark.skipif(not X86, reason="the values are those of x86")
def test_torchs_own_kernels_are_told_as_forced() -> None:
    assert told(TELL, **{ATEN: "default"})[ATEN] == "default"
    assert told(f"import torch; {TELL}", **{ATEN: "default"})[ATEN] == "default"


def test_this_session_computes_with_the_branch_that_klab_chooses() -> None:
    if WITH_MKL:
        assert kernels()[MKL] == told(TELL, **{MKL: os.environ[MKL]})[MKL]
        assert kernels()[MKL] != "OFF"
