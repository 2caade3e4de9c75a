"""The runs of a folder, the newest first; those that somebody looks at are kept open, a bounded number of cells."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from klab.grid import UserError
from klab.harness.serve.live_run import SECONDS, LiveRun
from klab.harness.serve.text import clipped

PAGE = 20
"""Runs on a page of the overview."""
CELLS = 200_000
"""Cells of all runs that are kept open at a time."""
_READING_SECONDS = 1.0
"""An answer waits for runs that were not opened before no longer than that; the next one has the others."""
_LISTED = 10_000


class RunsFolder:
    """A folder with run folders in it, or one run folder.

    Args:
        path: the folder.
        every: seconds between two looks at a run, at least.
        most: cells of all runs that are kept open at a time; the run that nobody looked at for longest is closed first.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, path: Path, every: float = SECONDS, most: int = CELLS) -> None:
        if not path.is_dir():
            raise UserError("there is no such folder", key="RUNS", value=str(path), hint="`klab launch` makes runs/.")
        self.path = path.resolve()
        self.single = (self.path / "manifest.json").is_file()
        self._every = every
        self._most = most
        self._open: OrderedDict[str, LiveRun] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Names of the run folders, the one whose manifest was written last first."""
        if self.single:
            return [self.path.name]
        found = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.name.isprintable():
                    continue
                try:
                    found.append((os.stat(f"{entry.path}/manifest.json").st_mtime, entry.name))
                except OSError:
                    continue
        return [name for _, name in sorted(found, key=lambda pair: (-pair[0], pair[1]))[:_LISTED]]

    def run(self, name: str) -> LiveRun:
        """The run in the folder of this name.

        Raises:
            FileNotFoundError: there is none.
            UserError: it is damaged.
        """
        with self._lock:
            known = self._open.get(name)
        if known is not None:
            self._keep(name, known)
            return known
        if name not in self.names():
            raise FileNotFoundError(name)
        opened = LiveRun(self.path if self.single else self.path / name, self._every)
        self._keep(name, opened)
        return opened

    def overview(self, words: str, page: int) -> dict[str, Any]:
        """What the page of all runs shows: a page of those whose name has the words, each with its state."""
        names = [name for name in self.names() if all(word in name.lower() for word in words.lower().split())]
        page = max(0, min(page, (len(names) - 1) // PAGE))
        began = time.monotonic()
        runs = []
        for name in names[page * PAGE : (page + 1) * PAGE]:
            if name not in self._open and time.monotonic() - began > _READING_SECONDS:
                runs.append({"name": name, "reading": True})
            else:
                runs.append({"name": name, **self._head(name)})
        return {
            "folder": clipped(str(self.path), 300),
            "single": self.path.name if self.single else None,
            "runs": runs,
            "page": page,
            "size": PAGE,
            "total": len(names),
        }

    def _head(self, name: str) -> dict[str, Any]:
        try:
            live = self.run(name)
            with live.lock:
                live.refresh()
                return live.head()
        except FileNotFoundError:
            return {"problem": "is gone"}
        except UserError as error:
            return {"problem": clipped(str(error), 500)}
        except Exception as error:  # a stranger's files may be wrong in any way; the other runs are shown
            return {"problem": f"its files cannot be read ({type(error).__name__})"}

    def _keep(self, name: str, live: LiveRun) -> None:
        with self._lock:
            self._open[name] = live
            self._open.move_to_end(name)
            while len(self._open) > 1 and self.cells_kept > self._most:
                self._open.popitem(last=False)

    @property
    def cells_kept(self) -> int:
        """Cells of the runs that are kept open."""
        return sum(len(each.run.cells) for each in self._open.values())
