"""The run folder: the only package that knows its layout."""

from klab.harness.store.cell_folder import CellFolder, Evicted
from klab.harness.store.lock import Held, Lock
from klab.harness.store.process import Holder
from klab.harness.store.run import Run
from klab.harness.store.scan import Snapshot, scan

__all__ = ["CellFolder", "Evicted", "Held", "Holder", "Lock", "Run", "Snapshot", "scan"]
