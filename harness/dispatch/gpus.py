"""The GPUs of this machine: which there are, whether torch can use them, and which jobs leave them alone.

A card that is divided (Multi-Instance GPU) is several devices to klab, named by their UUIDs: CUDA gives one process one
of them, and finds only the first unless CUDA_VISIBLE_DEVICES names another.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from functools import cache

from klab.grid import UserError
from klab.grid.user_code import python_command
from klab.harness.store import machine

HIDDEN = ""
"""The CUDA_VISIBLE_DEVICES of a job that leaves GPUs alone."""

_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""torch reads the first one in every version, and the second from 2.9 on where the first is absent."""

_CARD = re.compile(r"GPU (\d+):")
_INSTANCE = re.compile(r"\s+MIG (?P<profile>\S+)\s.*\(UUID: (?P<uuid>MIG-\S+?)\)")
_PROFILE_GB = re.compile(r"\.(\d+)gb")

_ASKED = "import torch; print(torch.version.cuda or '', torch.cuda.device_count())"
_SECONDS = 180


def visible_gpus() -> list[str]:
    """The devices that this process may use, as CUDA names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    return list(devices(_driver_list())) or [str(number) for number in range(len(machine.gpus()))]


def devices(listing: str) -> dict[str, float | None]:
    """Devices by the names that CUDA takes, from what `nvidia-smi -L` prints; of an instance of a divided card with its
    memory in GB of 2³⁰ bytes, as its profile rounds it (`3g.20gb`).

    >>> devices("GPU 0: NVIDIA H100 (UUID: GPU-1)\\n  MIG 3g.40gb     Device  0: (UUID: MIG-2)")
    {'MIG-2': 40.0}
    """
    found: dict[str, float | None] = {}
    card, last = "", ""
    for line in listing.splitlines():
        if whole := _CARD.match(line):
            card = last = whole[1]
            found[card] = None
        elif (part := _INSTANCE.match(line)) and card:
            if last == card:
                del found[card]
            last = part["uuid"]
            size = _PROFILE_GB.search(part["profile"])
            found[last] = float(size[1]) if size else None
    return found


@cache
def _driver_list() -> str:
    """What `nvidia-smi -L` prints; nothing where there is no GPU, or no such program."""
    if not machine.gpus():
        return ""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def gpu_memory_gb() -> float | None:
    """Memory of the largest NVIDIA GPU of this machine, in GB of 2³⁰ bytes; None where the driver does not tell.

    Where jobs get instances of divided cards it is that of the largest instance.
    """
    known = devices(_driver_list())
    instances = [size for name in visible_gpus() if (size := known.get(name)) is not None]
    if instances:
        return max(instances)
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    mebibytes = [int(line) for line in done.stdout.split() if line.isdecimal()]
    return max(mebibytes) / 1024 if mebibytes and not done.returncode else None


def let_segments_grow(samplers: Iterable[str] = ()) -> None:
    """Have torch's allocator on GPUs enlarge its segments in place of adding new ones, so that batches of every length
    leave less unusable memory between them: in this process, before it uses a GPU, and in those that it starts.

    What the user has set stays. Beside vLLM, whose own memory pools refuse such segments, nothing is set.

    Args:
        samplers: engines that draw rollouts in this process.
    """
    if "vllm" not in samplers and not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        os.environ[_ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def default_device(policies: Iterable[str], wanted: int) -> str | None:
    """`cpu` where all policies are tiny, which cores train faster, and no GPU was asked for; None: what there is.

    Args:
        policies: their names in the grid file.
        wanted: GPUs per job that the grid file or the command asks for.
    """
    return "cpu" if not wanted and set(policies) == {"tiny"} else None


def require_gpu(key: str, value: object) -> None:
    """See that torch can use a GPU here. It is asked in a process of its own, for loading it takes seconds.

    Args:
        key, value: the setting that asks for one.

    Raises:
        UserError: there is none, or torch cannot use it.
    """
    hint = "--device cpu leaves GPUs alone." if key == "--device" else f"--device cpu, or {key}: 0, does without."
    if not visible_gpus():
        raise UserError("there is no NVIDIA GPU here", key=key, value=value, hint=hint)
    done = subprocess.run(python_command("-c", _ASKED), capture_output=True, text=True, timeout=_SECONDS)
    words = done.stdout.split()
    if words[-1:] == ["0"] or done.returncode:
        last = [*done.stderr.strip().splitlines(), "it finds none"][-1]
        found = last if len(words) > 1 or done.returncode else "it was built without CUDA"
        raise UserError(f"torch cannot use the GPU: {found}", key=key, value=value, hint=f"See klab doctor. {hint}")


def hide_gpus() -> None:
    """Hide every GPU from this process, which must not have loaded torch yet, and from those that it starts."""
    os.environ["CUDA_VISIBLE_DEVICES"] = HIDDEN
