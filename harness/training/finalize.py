"""Finalise a cell: save policy and result durably, then delete the checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from klab.harness.store import CellFolder, files, machine
from klab.harness.training.pack import Pack
from klab.harness.training.summary import summarize


def finalize_cell(folder: CellFolder, pack: Pack, position: int, stopped: bool, processes: int) -> str:
    """Save the policy, write the result, delete the checkpoint; in this order.

    Returns:
        the cell's final state, `finished` or `diverged`.
    """
    partial = partial_policy(folder)
    pack.save_policy(partial, position)
    planned = pack.members[position].cell.training.updates
    return conclude(folder, partial, planned, stopped, processes, pack.policy.device)


def partial_policy(folder: CellFolder) -> Path:
    """Where the policy is written before it is whole; nothing is left there from an earlier attempt."""
    folder.assert_owner()
    partial = folder.path / "policy.partial"
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def conclude(
    folder: CellFolder, partial: Path, planned: int, stopped: bool, processes: int, device: torch.device
) -> str:
    """Publish a policy that was saved to `partial`, write the result, delete the checkpoint; in this order.

    Args:
        planned: updates that the cell was to make.
        stopped: training was stopped as diverged.
        processes, device: that trained it.

    Returns:
        the cell's final state, `finished` or `diverged`.
    """
    files.share_folder(partial)
    _make_durable(partial)
    shutil.rmtree(folder.policy, ignore_errors=True)
    partial.rename(folder.policy)
    found = summarize(planned, folder.metrics(), folder.evaluations(), stopped)
    folder.write_result({**found, **_provenance(processes, device)})
    shutil.rmtree(folder.checkpoint, ignore_errors=True)
    return str(found["state"])


def _make_durable(folder: Path) -> None:
    """Sync a folder's files to disk, so that they survive a power cut."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    files.sync_folder(folder)


def _provenance(processes: int, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    hardware = {
        **machine.hardware(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "device": name,
    }
    return {"versions": machine.versions(), "hardware": hardware}
