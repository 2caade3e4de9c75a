"""Cells in the settings of other trainers."""

from collections.abc import Callable

from klab.harness.export.setting import Export, Setting
from klab.harness.export.trl import trl_arguments
from klab.harness.export.verl import verl_overrides
from klab.harness.export.verl_cells import plugin_overrides

PEERS: dict[str, Callable[[Setting], Export]] = {
    "trl": trl_arguments,
    "verl": verl_overrides,
    "verl-plugin": plugin_overrides,
}
"""How each peer's settings are made."""

__all__ = ["PEERS", "Export", "Setting"]
