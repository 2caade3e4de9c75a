"""klab as a stranger has it: built as a wheel and installed in an environment outside of the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("grid", "tasks", "harness", "reports", "pyproject.toml", "README.md", "LICENSE")


def build(folder: Path) -> Path:
    """The wheel of this repository, made from a copy of it in `folder`."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    return next(folder.glob("*.whl"))


def install(wheel: Path, folder: Path) -> Path:
    """The Python of an environment in `folder` that has the wheel, and the other packages of the running one."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    _pip("--python", str(python), "install", "--no-deps", str(wheel))
    site = next(folder.glob("lib/python*/site-packages"))
    shared = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (site / "zz_shared.pth").write_text("\n".join(shared))  # files of the kind are not read in those folders
    return python


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
