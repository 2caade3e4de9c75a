"""Checkpoint of one cell between two updates: a single safetensors file.

Tensors: weights, Adam moments and step count of the policy and of its critic, weights of a reference policy that moves,
and for every rollout that is not used
up yet its tokens, masks, log-probabilities, rewards and values. Counters and adaptive coefficients are JSON in the
file's metadata. Nothing else is needed: random numbers are pure functions of what they are for (`runtime/rng.py`), and
a lagged rollout is sampled when the policy has the right weights (`optim/schedule.py`), so that neither generator
states nor old weights are stored.

The file is replaced atomically and contains no pickle: reading a stranger's checkpoint runs no code. It is written
piece by piece, so that the host needs `PIECE` bytes for it whatever the model's size; the library safetensors would
want the bytes of all tensors at once.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from klab.harness.objective import LossCoefficients
from klab.harness.policy.load import is_sharded
from klab.harness.policy.rollout import Rollout
from klab.harness.store import CellFolder, files
from klab.harness.training.data.dynamic_sampling import SamplingStats
from klab.harness.training.data.experience import Experience
from klab.harness.training.distributed import sharded_checkpoint

FILE = "state.safetensors"
SCHEMA = 3

PIECE = 2**26
"""Most bytes of tensors that are copied to the host at once while a checkpoint is written."""

_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As the format safetensors has them."""

_NO_CHECKSUM = "--------"


class UnusableCheckpoint(Exception):
    """The file is torn, of another cell, or of another version: the cell starts again from its beginning."""


@dataclass(slots=True)
class CellState:
    """One cell between two updates.

    Attributes:
        cell: its id.
        update: updates done.
        streak: non-finite updates in a row up to now.
        optimizer: weights, moments and step count by name, on any device; not copies, unless they were read.
        pending: rollouts drawn and not used up, oldest first.
        critic: weights, moments and step count of its critic by name, likewise; empty without one.
        coefficients: those of the next update.
        reference: weights of its reference policy by name, where that moves; else empty.
        shards: the folder of weights and moments that processes share out (`distributed/sharded_checkpoint.py`), of
            which `optimizer` has the step count alone; None where it has everything.
    """

    cell: str
    update: int
    streak: int
    optimizer: dict[str, Tensor]
    pending: list[Experience] = field(default_factory=list)
    critic: dict[str, Tensor] = field(default_factory=dict)
    coefficients: LossCoefficients = field(default_factory=LossCoefficients)
    reference: dict[str, Tensor] = field(default_factory=dict)
    shards: Path | None = None


def write(folder: Path, state: CellState, durable: bool = True) -> None:
    """Replace the checkpoint in `folder`, atomically; with `durable` it also survives a power cut."""
    folder.mkdir(exist_ok=True)
    files.remove_temporaries(folder)
    tensors, text = _stored(state), _counters(state)
    metadata = {"schema": str(SCHEMA), "klab": text, "crc": _NO_CHECKSUM}
    head = _header(tensors, metadata)
    with files.replacing(folder / FILE, durable=durable) as descriptor:
        files.write_all(descriptor, head)
        value = zlib.crc32(text.encode())
        for name, tensor in tensors.items():
            value = zlib.crc32(name.encode(), value)
            for piece in _pieces(tensor):
                value = zlib.crc32(piece, value)
                files.write_all(descriptor, piece)
        os.pwrite(descriptor, f"{value:08x}".encode(), head.rindex(_NO_CHECKSUM.encode()))


def _stored(state: CellState) -> dict[str, Tensor]:
    """All tensors of the file in its order: those of wide numbers first, so that each begins at a multiple of its
    numbers' width."""
    tensors = {f"optimizer/{name}": value for name, value in state.optimizer.items()}
    tensors |= {f"critic/{name}": value for name, value in state.critic.items()}
    tensors |= {f"reference/{name}": value for name, value in state.reference.items()}
    for place, experience in enumerate(state.pending):
        tensors |= {f"pending/{place}/{name}": value for name, value in _tensors(experience).items()}
    return {name: tensors[name].detach() for name in _in_order(tensors)}


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def _counters(state: CellState) -> str:
    pending = []
    for experience in state.pending:
        plain = {name: value for name, value in _fields(experience.rollout).items() if not isinstance(value, Tensor)}
        drawn = None if experience.sampling_stats is None else asdict(experience.sampling_stats)
        pending.append({"number": experience.number, "rollout": plain, "drawn": drawn})
    counters = {
        "cell": state.cell,
        "update": state.update,
        "streak": state.streak,
        "coefficients": asdict(state.coefficients),
        "pending": pending,
    }
    return json.dumps(counters)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file: the length of a JSON text in 8 bytes, and the text, padded with spaces."""
    described: dict[str, Any] = {}
    end = 0
    for name, value in tensors.items():
        start, end = end, end + value.numel() * value.itemsize
        described[name] = {
            "dtype": _TYPE_NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps({**described, "__metadata__": dict(metadata)}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, at most `PIECE` of them on the host at once."""
    flat = tensor.reshape(-1)
    step = max(1, PIECE // tensor.itemsize)
    for start in range(0, len(flat), step):
        yield flat[start : start + step].cpu().view(torch.uint8).numpy().data


def read(file: Path, cell: str, device: torch.device) -> CellState:
    """The state in `file`, pending rollouts on `device`, all else where the file is mapped into memory.

    Raises:
        UnusableCheckpoint: where it is damaged, of another schema, or of another cell than `cell`.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UnusableCheckpoint(f"{file} cannot be read: {error}") from error
    if metadata.get("schema") != str(SCHEMA):
        raise UnusableCheckpoint(f"{file} has schema {metadata.get('schema')}, not {SCHEMA}")
    if metadata.get("crc") != _checksum(metadata.get("klab", ""), tensors):
        raise UnusableCheckpoint(f"{file} is damaged: its checksum does not fit")
    counters = json.loads(metadata["klab"])
    if counters["cell"] != cell:
        raise UnusableCheckpoint(f"{file} belongs to cell {counters['cell']}, not {cell}")
    pending = [
        _experience(described, _below(tensors, f"pending/{place}/"), device)
        for place, described in enumerate(counters["pending"])
    ]
    return CellState(
        cell=cell,
        update=counters["update"],
        streak=counters["streak"],
        optimizer=_below(tensors, "optimizer/"),
        pending=pending,
        critic=_below(tensors, "critic/"),
        coefficients=LossCoefficients(**counters["coefficients"]),
        reference=_below(tensors, "reference/"),
        shards=sharded_checkpoint.find(file.parent, counters["update"]),
    )


def resume(folder: CellFolder, device: torch.device) -> CellState | None:
    """The state to go on from, with the records cut back to it; None to start afresh."""
    file = folder.checkpoint / FILE
    state = None
    if file.exists():
        try:
            state = read(file, folder.id, device)
            if (state.shards is None) == is_sharded(folder.cell().policy):
                raise UnusableCheckpoint(f"{file} does not have the weights as policy.sharding now shares them out")
        except UnusableCheckpoint as problem:
            print(f"{folder.id} starts again from its beginning: {problem}", file=sys.stderr)
    if state is not None and folder.truncate_metrics(state.update) == state.update:
        every = folder.cell().training.evaluate_every
        if folder.truncate_evaluations(state.update) == state.update // every + 1:
            return state
    folder.truncate_metrics(0)
    folder.truncate_evaluations(-1)
    return None


_STORED_NAMES = {
    "rewards": "rewards",
    "correct": "correct",
    "reference": "reference_logprobs",
    "greedy": "greedy_rewards",
    "terms": "reward_terms",
    "values": "values",
    "recomputed": "old_logprobs",
    "timeouts": "timeouts",
}
"""Name in the file -> field of `Experience`."""


def _fields(value: Rollout) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in fields(value) if each.init}


def _tensors(experience: Experience) -> dict[str, Tensor]:
    found = {f"rollout/{name}": value for name, value in _fields(experience.rollout).items()}
    found |= {name: getattr(experience, attribute) for name, attribute in _STORED_NAMES.items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _experience(described: Mapping[str, Any], stored: Mapping[str, Tensor], device: torch.device) -> Experience:
    placed = {name: value.to(device) for name, value in stored.items()}
    scores: dict[str, Any] = {attribute: placed.get(name) for name, attribute in _STORED_NAMES.items()}
    rollout: dict[str, Any] = {**described["rollout"], **_below(placed, "rollout/")}
    drawn = None if described["drawn"] is None else SamplingStats(**described["drawn"])
    return Experience(described["number"], Rollout(**rollout), **scores, sampling_stats=drawn)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of the counters, and of the name and the bytes of every tensor in the file's order."""
    value = zlib.crc32(text.encode())
    for name in _in_order(tensors):
        value = zlib.crc32(name.encode(), value)
        for piece in _pieces(tensors[name]):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"
