"""Folders that many processes may want at once, and one of them makes: complete, or not there at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from klab.harness.store.files import share_folder


def made_once(folder: Path, marker: str, build: Callable[[Path], object]) -> Path:
    """The folder, made by `build` in a scratch folder beside it unless it is there, and renamed into place.

    Args:
        marker: a file that a complete folder has; `build` writes it.
        build: fills the folder that it is given.
    """
    if (folder / marker).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f"{folder.name}.lock"):
        if not (folder / marker).exists():
            make_whole(folder, build)
    return folder


def make_whole(folder: Path, build: Callable[[Path], object]) -> None:
    """Have `build` fill a scratch folder beside `folder`, which then takes that name: complete, or not at all.

    Raises:
        OSError: with ENOTEMPTY or EEXIST, where something else has taken the name meanwhile.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(scratch)
        share_folder(scratch)
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system releases it when the process ends, however it ends."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
