"""The run folder: the only package that knows its layout."""

from klab.harness.store.cell_folder import CellFolder, ClaimRevoked
from klab.harness.store.lock import Lock, LockHeld
from klab.harness.store.process import ProcessId
from klab.harness.store.run import Run
from klab.harness.store.scan import Snapshot, scan

__all__ = ["CellFolder", "ClaimRevoked", "Lock", "LockHeld", "ProcessId", "Run", "Snapshot", "scan"]
