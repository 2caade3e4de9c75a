"""Cells in the settings of other trainers."""

from collections.abc import Callable

from klab.harness.export.translation import Export, Setting
from klab.harness.export.trl import trl
from klab.harness.export.verl import verl

PEERS: dict[str, Callable[[Setting], Export]] = {"trl": trl, "verl": verl}
"""How each peer's settings are made."""

__all__ = ["PEERS", "Export", "Setting", "trl", "verl"]
