"""Files of a run folder from anybody: opened only where they lie in it, through no link."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from klab.harness.store.files import damaged_file

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
_LINK = (errno.ELOOP, errno.EMLINK)


def open_inside(root: Path, names: Sequence[str]) -> FileIO:
    """An ordinary file below `root`, opened for reading.

    Each name is looked up in the folder that was opened before it, so that nobody can put a link into the way.

    Args:
        names: the folders on the way, and the file.

    Raises:
        UserError: one of them is a link, or the last is no ordinary file.
        FileNotFoundError: there is no such file, or a name is none.
    """
    path = root.joinpath(*names)
    if not names or any(name in ("", ".", "..") or "/" in name or "\0" in name for name in names):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names[:-1]:
            inner = _open(name, _FOLDER, folder, path)
            os.close(folder)
            folder = inner
        descriptor = _open(names[-1], _FILE, folder, path)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise damaged_file(path, "is not an ordinary file")
    return FileIO(descriptor)


def _open(name: str, flags: int, folder: int, path: Path) -> int:
    try:
        return os.open(name, flags, dir_fd=folder)
    except NotADirectoryError as error:
        if _is_link(name, folder):
            raise damaged_file(path, f"is reached through the link {name!r}") from error
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except OSError as error:
        if error.errno in _LINK:
            raise damaged_file(path, "is a link, not a file") from error
        if error.errno == errno.ENXIO:
            raise damaged_file(path, "is not an ordinary file") from error
        raise


def _is_link(name: str, folder: int) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
