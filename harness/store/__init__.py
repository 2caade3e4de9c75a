"""The run folder: the only package that knows its layout."""

from harness.store.cell_folder import CellFolder, Evicted
from harness.store.holder import Holder
from harness.store.lock import Held, Lock
from harness.store.run import Run
from harness.store.scan import Snapshot, scan

__all__ = ["CellFolder", "Evicted", "Held", "Holder", "Lock", "Run", "Snapshot", "scan"]
