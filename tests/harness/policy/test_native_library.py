"""The compiled layers' library: built once, by whom there is, with the same sums whatever the processor's width."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from klab.harness.policy.stacked.native.library import build
from klab.harness.store.kernels import ATEN, COMPILERS, NATIVE, processor
from tests.support.native_policy import CHECKED, ROOT, computed

pytestmark = [
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no compiler"),
    pytest.mark.skipif(os.environ.get(NATIVE) == "0", reason=f"{NATIVE}=0"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return computed(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """klab's cache, empty."""
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_library_is_built_once(cache: Path) -> None:
    file = build()
    assert file is not None
    before = file.stat()
    assert build() == file
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert [path for path in cache.rglob("*") if path.is_file()] == [file]


def test_a_compiler_that_fails_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text(
        '#!/bin/sh\nwhile [ $# -gt 1 ] && [ "$1" != -o ]; do shift; done\n[ $# -gt 1 ] && echo half > "$2"\nexit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent))
    assert build() is None
    assert list(cache.glob("*/*")) == []
    compiler.unlink()
    assert build() is None


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.write_text("a file")
    assert build() is None


def test_processes_that_build_at_once_leave_one_file(cache: Path) -> None:
    code = "from klab.harness.policy.stacked.native.library import library; assert library() is not None"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    file = build()
    assert file is not None
    assert list(cache.rglob("native/*")) == [file]


@pytest.mark.parametrize("without", [NATIVE, "PATH"])
def test_without_the_library_the_other_path_writes_the_same(
    compiled: dict[str, Any], tmp_path: Path, without: str
) -> None:
    assert (compiled["library"], compiled["native"], compiled["decoder"]) == (True, True, "NativeDecoder")
    found = computed(tmp_path, **{without: "0"})
    assert (found["library"], found["native"], found["decoder"]) == (False, False, "KVCacheDecoder")
    for one, other in zip(found["tokens"], compiled["tokens"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="not an x86 processor")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_narrower_kernels_compute_the_same(compiled: dict[str, Any], tmp_path: Path, capability: str) -> None:
    """Sums have a fixed order: with the same fused operations, the same bits."""
    same = capability == "avx2"
    if same and not {"avx2", "fma"} <= processor()[1]:
        pytest.skip("no AVX2")
    narrow = computed(tmp_path, **{ATEN: capability})
    assert Path(narrow["built"]).name != Path(compiled["built"]).name
    unequal = []
    for name in CHECKED:
        (states, slopes), (others, other_slopes) = compiled["computed"][name], narrow["computed"][name]
        pairs = {parameter: (value, other_slopes[parameter]) for parameter, value in slopes.items()}
        pairs |= {f"states {cell}": pair for cell, pair in enumerate(zip(states, others, strict=True))}
        for what, (one, other) in pairs.items():
            assert (one - other).abs().max() <= 1e-5 * one.abs().max(), (name, what)
            if same and not torch.equal(one, other):
                unequal.append((name, what))
    assert unequal == []
