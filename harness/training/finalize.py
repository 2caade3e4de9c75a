"""Finalise a cell: save policy and result durably, with evaluations in between, then delete the checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from klab.grid.libraries import libraries
from klab.grid.schema.evaluate import Evaluations
from klab.harness.store import CellFolder, files, machine
from klab.harness.training.final_evaluation import evaluate_policy
from klab.harness.training.pack import Pack
from klab.harness.training.summary import summarize


def finalize_cell(
    folder: CellFolder,
    pack: Pack,
    position: int,
    processes: int,
    diverged: bool = False,
    hopeless: str | None = None,
    evaluations: Evaluations | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """Save the policy, evaluate it where that is asked for, write the result, delete the checkpoint; in this order.

    Args:
        diverged, hopeless, evaluations, stop: as `conclude` takes them.

    Returns:
        the cell's final state, `finished`, `diverged` or `stopped`; `interrupted` where the evaluations were stopped.
    """
    partial = partial_policy(folder)
    pack.save_policy(partial, position)
    planned = pack.members[position].cell.training.updates
    return conclude(
        folder,
        partial,
        planned,
        processes,
        pack.policy.device,
        diverged,
        hopeless,
        evaluations=evaluations,
        stop=stop,
    )


def partial_policy(folder: CellFolder) -> Path:
    """Where the policy is written before it is whole; nothing is left there from an earlier attempt."""
    folder.assert_owner()
    partial = folder.path / "policy.partial"
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def conclude(
    folder: CellFolder,
    partial: Path,
    planned: int,
    processes: int,
    device: torch.device,
    diverged: bool = False,
    hopeless: str | None = None,
    used: Iterable[str] | None = None,
    evaluations: Evaluations | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """Publish a policy that was saved to `partial`, evaluate it, write the result, delete the checkpoint; in this
    order.

    Args:
        planned: updates that the cell was to make.
        processes, device: that trained it.
        diverged: training was ended as diverged.
        hopeless: why `training.stop` ended it; None: it did not.
        used: optional libraries; None: those that the cell's settings name.
        evaluations: what a finished policy is evaluated on besides its task.
        stop: asked during these evaluations; once it is true, they end and no result is written.

    Returns:
        the cell's final state, `finished`, `diverged` or `stopped`; `interrupted` where the evaluations were stopped.
    """
    files.share_folder(partial)
    _make_durable(partial)
    shutil.rmtree(folder.policy, ignore_errors=True)
    partial.rename(folder.policy)
    found = summarize(planned, folder.metrics(), folder.evaluations(), diverged, hopeless)
    if evaluations is not None and found["state"] == "finished":
        measured = evaluate_policy(folder, evaluations, device.type, stop)
        if measured is None:
            return "interrupted"
        found |= measured
    versions = machine.versions(libraries(folder.resolved()) if used is None else used)
    folder.write_result({**found, "versions": versions, "hardware": _hardware(processes, device)})
    shutil.rmtree(folder.checkpoint, ignore_errors=True)
    return str(found["state"])


def _make_durable(folder: Path) -> None:
    """Sync a folder's files to disk, so that they survive a power cut."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    files.sync_folder(folder)


def _hardware(processes: int, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        **machine.hardware(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "device": name,
    }
