"""Weights and moments that processes share out, on disk: `torch.distributed.checkpoint` in its safetensors format.

A checkpoint of update u is a folder `shards-<u>` beside the cell's `state.safetensors`, which is written after it and
decides which folder counts: a save that is killed leaves the previous pair as it was. Each process writes its own rows,
and reads those that it needs, whichever processes wrote them. There is no pickle, neither on disk (torch's own format
has one in `.metadata`) nor between processes (torch would exchange its plans so): the rows of each tensor are in the
files' headers, and `shards.json` lists the files with their sizes and checksums.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.harness.store import files
from klab.harness.training.distributed.process_group import ProcessGroup

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

LIST = "shards.json"

_FILE_BYTES = 2**28
"""Bytes of a process's shares that are written to one file, through a buffer of that size."""

_NAME = re.compile(r"\.?shards-\d{8}(\.partial)?")

_BLOCK = 2**24


def write(folder: Path, update: int, shares: Mapping[str, DTensor], process_group: ProcessGroup) -> None:
    """Collective: write what all processes have of `shares` as the checkpoint of an update.

    Raises:
        PropagatedError: where one process cannot.
    """
    final, partial = folder / f"shards-{update:08}", folder / f".shards-{update:08}.partial"

    def begin() -> None:
        if process_group.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def written() -> dict[str, list[int]]:
        _save(partial, shares, process_group.rank)
        own = sorted(partial.glob(f"shard-{process_group.rank + 1:05}-*"))
        return {file.name: [file.stat().st_size, _checksum(file)] for file in own}

    process_group.all_gather_object("a checkpoint", begin)
    parts = process_group.all_gather_object("a checkpoint's files", written)

    def finish() -> None:
        if process_group.is_main:
            listed = {name: facts for part in parts for name, facts in part.items()}
            files.replace(partial / LIST, files.encode_record({"files": listed}))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            files.sync_folder(folder)

    process_group.all_gather_object("the end of a checkpoint", finish)


def find(folder: Path, update: int) -> Path | None:
    """The shards of an update; None where there are none, or some of their files are absent or cut short."""
    path = folder / f"shards-{update:08}"
    try:
        listed = _listed(path)
        complete = all((path / name).stat().st_size == size for name, (size, _) in listed.items())
    except (OSError, ValueError):
        return None
    return path if complete and listed else None


def read(path: Path, shares: Mapping[str, DTensor], process_group: ProcessGroup) -> None:
    """Collective: fill this process's rows of `shares`, in place.

    Raises:
        PropagatedError: where files are damaged, or belong to another model.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    def filled() -> None:
        listed = _listed(path)
        for number, (name, (_, checksum)) in enumerate(sorted(listed.items())):
            if number % process_group.size == process_group.rank and _checksum(path / name) != checksum:
                raise RuntimeError(
                    f"{path / name} is damaged: its checksum does not fit; without {path.parent} the cell "
                    "starts again from its beginning"
                )
        with _silent():
            load(dict(shares), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)

    process_group.all_gather_object("a checkpoint", filled)


def remove_others(folder: Path, update: int) -> None:
    """Remove the shards of every other update, and of saves that were killed."""
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name) and path.name != f"shards-{update:08}":
            shutil.rmtree(path, ignore_errors=True)


def _listed(path: Path) -> dict[str, tuple[int, int]]:
    record = files.read_record(path / LIST) or {}
    return {str(name): (int(size), int(checksum)) for name, (size, checksum) in record.get("files", {}).items()}


def _save(path: Path, shares: Mapping[str, DTensor], rank: int) -> None:
    """Write this process's rows, without the others: what torch would agree on with them follows from the rank."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class OwnPlan(DefaultSavePlanner):
        """Plans that do not have to cover whole tensors."""

        def create_global_plan(self, all_plans: Any) -> Any:
            self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
            return self.global_plan, self.metadata

    class OwnFiles(HuggingFaceStorageWriter):
        """Files that are named by the rank."""

        def prepare_global_plan(self, plans: Any) -> Any:
            named = super().prepare_global_plan(plans)
            return [replace(plan, storage_data={**plan.storage_data, "shard_index": rank + 1}) for plan in named]

    writer = OwnFiles(str(path), _file_numbers(shares), save_distributed=True)
    with _silent():
        save(dict(shares), storage_writer=writer, planner=OwnPlan(), no_dist=True)


def _file_numbers(shares: Mapping[str, DTensor]) -> dict[str, int]:
    """Which file, from 1, each tensor goes into."""
    numbers, number, filled = {}, 1, 0
    for name, share in shares.items():
        local = share.to_local()
        size = local.numel() * local.element_size()
        if filled and filled + size > _FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name], filled = number, filled + size
    return numbers


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


@contextmanager
def _silent() -> Iterator[None]:
    """Without torch's warning that this process alone takes part, which is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
