"""What the cells' folders say, for somebody who looks again and again: only what changed is read.

Nothing is written. A look costs one listing of the folder of cells, two `stat` per open cell that has a folder, and one
for some of the cells with a result, in turn; files are opened only of cells whose folder or attempts changed.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Hashable

from klab.harness.store.files import damaged_file
from klab.harness.store.lock import is_stale
from klab.harness.store.process import ProcessId
from klab.harness.store.run import Run
from klab.harness.store.scan import Snapshot, look_at, names_in, read_index, stamp_of

RESULTS_AT_A_LOOK = 256
"""So many results are looked at again in every look: their files do not change, unless somebody removes them."""
_SETTLED = 2.0
"""Seconds after which a folder's time stamp tells a second change from the first one."""


class Watcher:
    """The snapshots of a run's cells, kept up to date.

    Attributes:
        snapshots: by cell, in the manifest's order; see `klab.harness.store.Snapshot`.
        ended_at: by cell, when its result was written, in seconds since 1970.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.snapshots = {identity: Snapshot(identity) for identity in run.cells}
        self.ended_at: dict[str, float] = {}
        self._marks: dict[str, Hashable] = {}
        self._results: dict[str, list[int]] = {}
        self._open = dict.fromkeys(run.cells)
        self._turn = 0
        self._index = read_index(run)

    def look(self) -> list[str]:
        """Look at the run; the cells of which something changed since the last look.

        Raises:
            UserError: the folder of cells is a link.
        """
        folders = f"{self.run.path}/cells"
        if os.path.islink(folders):
            raise damaged_file(folders, "is a link, not a folder")
        present = names_in(folders)
        lives: dict[ProcessId | None, bool] = {}
        changed = [identity for identity in self._due(present) if self._has_changed(folders, identity, present, lives)]
        self._index = {}  # needed for the first look only
        return changed

    def _due(self, present: set[str]) -> list[str]:
        """All open cells, those with a result whose folder is gone, and some of the others with a result."""
        ended = list(self._results)
        some = ended[self._turn : self._turn + RESULTS_AT_A_LOOK]
        self._turn = self._turn + RESULTS_AT_A_LOOK if self._turn + RESULTS_AT_A_LOOK < len(ended) else 0
        gone = [identity for identity in ended if identity not in present]
        return [*self._open, *dict.fromkeys([*gone, *some])]

    def _has_changed(self, folders: str, identity: str, present: set[str], lives: dict[ProcessId | None, bool]) -> bool:
        if identity not in present:
            return identity in self._marks and self._replace(identity, Snapshot(identity), None, None)
        path = f"{folders}/{identity}"
        result = self._results.get(identity)
        if result is not None and stamp_of(f"{path}/result.json") == result:
            return False
        mark = _mark(path)
        if mark is not None and mark == self._marks.get(identity):
            return self._has_died(identity, path, lives)
        if os.path.islink(path):
            problem = str(damaged_file(path, "is a link, not a folder"))
            return self._replace(identity, Snapshot(identity, problem=problem), mark, None)
        stamp = stamp_of(f"{path}/result.json")
        known = self._index.get(identity)
        if stamp is not None and known is not None and known[0] == stamp:
            return self._replace(identity, Snapshot(identity, known[1]), mark, stamp)
        snapshot = look_at(self.run.cell(identity), probe=False)
        return self._replace(identity, snapshot, mark, stamp if snapshot.result is not None else None)

    def _replace(self, identity: str, snapshot: Snapshot, mark: Hashable, stamp: list[int] | None) -> bool:
        self._marks[identity] = mark
        if stamp is None:
            self._open[identity] = None
            self._results.pop(identity, None)
            self.ended_at.pop(identity, None)
        else:
            self._open.pop(identity, None)
            self._results[identity] = stamp
            self.ended_at[identity] = stamp[1] / 1e9
        if snapshot == self.snapshots[identity]:
            return False
        self.snapshots[identity] = snapshot
        return True

    def _has_died(self, identity: str, path: str, lives: dict[ProcessId | None, bool]) -> bool:
        """Whether the process that has the claim was alive at the last look and is not, or the other way round: no
        file tells. Cells of one pack have one process, which is looked for once.
        """
        snapshot = self.snapshots[identity]
        if snapshot.claim is None:
            return False
        holder = ProcessId.from_record(snapshot.claim)
        alive = lives.get(holder)
        if alive is None:
            known = holder.is_alive() if holder is not None else None
            alive = (
                known
                if known is not None
                else not is_stale(self.run.cell(identity).path / "claim", snapshot.claim, False)
            )
            if known is not None:
                lives[holder] = alive
        if alive == snapshot.alive:
            return False
        snapshot.alive = alive
        return True


def _mark(path: str) -> Hashable:
    """What differs after any change in a cell's folder its state depends on; None where it is too fresh to tell."""
    try:
        folder = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISDIR(folder.st_mode):
        return folder.st_ino, folder.st_ctime_ns
    attempts = stamp_of(f"{path}/attempts.jsonl") or []
    newest = max([folder.st_mtime_ns, *attempts[1:3]]) / 1e9
    if newest > time.time() - _SETTLED:
        return None
    return folder.st_ino, folder.st_mtime_ns, tuple(attempts)
