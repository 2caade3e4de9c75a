"""The GPUs of this machine: which there are, whether torch can use them, and which jobs leave them alone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable

from klab.grid import UserError
from klab.grid.user_code import python_command
from klab.harness.store import machine

HIDDEN = ""
"""The CUDA_VISIBLE_DEVICES of a job that leaves GPUs alone."""

_ASKED = "import torch; print(torch.version.cuda or '', torch.cuda.device_count())"
_SECONDS = 180


def visible_gpus() -> list[str]:
    """The devices that this process may use, as CUDA names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(len(machine.gpus()))]
    return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]


def gpu_memory_gb() -> float | None:
    """Memory of the largest NVIDIA GPU of this machine, in GB of 2³⁰ bytes; None where the driver does not tell."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    mebibytes = [int(line) for line in done.stdout.split() if line.isdecimal()]
    return max(mebibytes) / 1024 if mebibytes and not done.returncode else None


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
