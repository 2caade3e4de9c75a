"""Disks that are full or broken: whatever write fails, the next life ends with the bits of an undisturbed one."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import MakeRun
from tests.support.forked_runs import live, wait
from tests.support.small_cells import assert_same

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]
CALLS = ("write", "fsync", "replace", "link", "open", "mkdir", "rename")
SETTINGS: dict[str, Any] = {"training": {"updates": 2, "checkpoint_updates": 1, "evaluate_every": 2}}


class Sabotage:
    """Makes the nth call into the disk fail, in this process: `only` that one, or that one and all after it."""

    def __init__(self, number: int, code: int, only: bool) -> None:
        self.left, self.code, self.only = number, code, only
        self._reached = mmap.mmap(-1, 1)  # shared with the forked process

    @property
    def reached(self) -> bool:
        """Whether there were that many calls."""
        return self._reached[0] == 1

    def __call__(self) -> None:
        for name in CALLS:
            setattr(os, name, self._spoilt(getattr(os, name), name))

    def _spoilt(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def spoilt(*arguments: Any, **keywords: Any) -> Any:
            writes = name != "open" or (len(arguments) > 1 and arguments[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
            if writes:
                self.left -= 1
                if self.left == 0 or (self.left < 0 and not self.only):
                    self._reached[0] = 1
                    raise OSError(self.code, os.strerror(self.code), str(arguments[0]))
            return call(*arguments, **keywords)

        return spoilt


@pytest.mark.parametrize(("code", "only"), [(errno.EIO, True), (errno.ENOSPC, False)], ids=["EIO", "ENOSPC"])
def test_every_write_fails_once(make_run: MakeRun, finished: MakeRun, code: int, only: bool) -> None:
    """A bad block spoils one write; a full disk spoils all from one on. Every write of a cell's life takes its turn."""
    quiet = finished("disk", **SETTINGS)
    endings: dict[int, int] = {}
    number = 0
    while True:
        number += 1
        run = make_run("disk", f"runs{number}", **SETTINGS)
        sabotage = Sabotage(number, code, only)
        ending = wait(live(run, sabotage))
        if not sabotage.reached:
            break
        endings[ending] = endings.get(ending, 0) + 1
        assert wait(live(run)) == 0, f"write {number}"
        assert_same(quiet, run)
        shutil.rmtree(run.path)
    assert any(endings.get(code) for code in (2, 3))
    print(f"{number - 1} writes failed with {errno.errorcode[code]}; endings {endings}; records lost: 0")


def test_a_disk_of_every_size(make_run: MakeRun, finished: MakeRun, policy: Path, tmp_path: Path) -> None:
    """A real file system that is too small by a little less each time, then large enough."""
    quiet = finished("disk", **SETTINGS)
    command = [sys.executable, "-m", "tests.faults.small_disk", tmp_path / "disk.yaml", tmp_path / "mounted"]
    (tmp_path / "mounted").mkdir()
    script = ["unshare", "--map-root-user", "--mount", *map(str, command)]
    if subprocess.run([*script[:3], "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here, hence no file system of our own")
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    from klab.harness.store import Run

    for copy in sorted((tmp_path / "mounted.kept").iterdir()):
        assert_same(quiet, Run.open(copy))
