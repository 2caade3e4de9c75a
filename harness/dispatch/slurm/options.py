"""Options of sbatch: those that klab derives from `resources`, and those of the user, which replace them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from klab.grid import UserError
from klab.grid.schema.sections import Resources

RESERVED_OPTIONS = (
    *("array", "job-name", "output", "error", "open-mode", "signal", "chdir", "dependency", "requeue", "no-requeue"),
    *("nodes", "ntasks", "ntasks-per-node", "wrap"),
)
"""Options that klab sets itself, because its bookkeeping depends on them."""

_SHORT = {
    **{"A": "account", "a": "array", "b": "begin", "C": "constraint", "c": "cpus-per-task", "d": "dependency"},
    **{"D": "chdir", "e": "error", "F": "nodefile", "G": "gpus", "J": "job-name", "L": "licenses", "M": "clusters"},
    **{"m": "distribution", "N": "nodes", "n": "ntasks", "o": "output", "p": "partition", "q": "qos"},
    **{"s": "oversubscribe", "t": "time", "w": "nodelist", "x": "exclude"},
}
"""sbatch's one-letter options."""

_ALTERNATIVES = (
    ("mem", "mem-per-cpu", "mem-per-gpu"),
    ("cpus-per-task", "cpus-per-gpu"),
    ("gpus-per-node", "gpus", "gpus-per-task", "gpus-per-socket", "gres"),
)
"""Options that sbatch refuses beside one another, or that ask for the same thing in several ways."""

_UNLIMITED_MINUTES = 365 * 24 * 60


def user_options(resources: Resources) -> dict[str, str | int | bool]:
    """The options in `resources.sbatch` by their long names.

    Raises:
        UserError: for an option that klab sets itself.
    """
    found = {}
    for written, value in resources.sbatch.items():
        plain = written.lstrip("-")
        name = _SHORT.get(plain, plain.replace("_", "-"))
        if name in RESERVED_OPTIONS:
            instead = {"nodes": "resources.nodes", "ntasks": "resources.processes"}.get(name)
            raise UserError(
                "is set by klab",
                key=f"resources.sbatch.{written}",
                value=value,
                hint=f"Use {instead}." if instead else None,
            )
        found[name] = value
    return found


def with_user_options(resources: Resources) -> Resources:
    """The resources that a job gets when the user's options of sbatch replace klab's.

    Time limit, threads and GPUs follow from `time`, `cpus-per-task`, `cpus-per-gpu` and the options for GPUs, so that
    the signal before the limit comes in time and each GPU has its process.

    Raises:
        UserError: for an option that klab sets itself, or a value that sbatch does not know.
    """
    options = user_options(resources)
    changes: dict[str, Any] = {}
    if _written(options, "time"):
        changes["minutes"] = _minutes(options["time"])
    for name in ("cpus-per-task", "cpus-per-gpu"):
        if _written(options, name):
            changes["cpus"] = _count(name, options[name])
    found = _gpus(options, resources)
    if found is not None:
        changes["gpus"], changes["gpu_type"] = found
    return resources.model_copy(update=changes)


def sbatch_options(resources: Resources, *, gres: bool = False) -> dict[str, Any]:
    """sbatch's options for time, memory, cores, GPUs and queue, as submitit spells them: long names with underscores.

    An option of the user's replaces klab's of the same name and its alternatives; `false` leaves it out altogether.

    Args:
        resources: as `with_user_options` gives them.
        gres: ask for GPUs by `--gres`, on clusters that know no other way.
    """
    gpus = f"{resources.gpu_type}:{resources.gpus}" if resources.gpu_type else str(resources.gpus)
    ours: dict[str, Any] = {
        "time": resources.minutes,
        # a launcher starts all processes of a node from one task
        "cpus-per-task": resources.cpus * (resources.processes_per_node if resources.launcher else 1),
        "mem": _memory(resources.memory_gb),
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclude": resources.exclude,
    }
    if resources.gpus:
        ours |= {"gres": f"gpu:{gpus}"} if gres else {"gpus-per-node": gpus}
    options = user_options(resources)
    for alternatives in _ALTERNATIVES:
        if any(name in options and _is_about(name, options[name]) for name in alternatives):
            ours = {name: value for name, value in ours.items() if name not in alternatives}
    merged = {**ours, **options}
    return {name.replace("-", "_"): value for name, value in merged.items() if value is not None and value is not False}


def memory_limit_gb(resources: Resources) -> float | None:
    """Memory of a node for a job, in GB; None where an option of the user's says it in another way."""
    options = user_options(resources)
    return None if any(name in options for name in _ALTERNATIVES[0]) else resources.memory_gb


def _is_about(name: str, value: object) -> bool:
    """Whether an option concerns what its alternatives do: `gres` may ask for something else than GPUs."""
    return name != "gres" or value is False or "gpu" in str(value)


def _written(options: Mapping[str, Any], name: str) -> bool:
    return options.get(name, False) is not False


def _gpus(options: Mapping[str, Any], resources: Resources) -> tuple[int, str | None] | None:
    """GPUs per node and their type, from the user's option for GPUs; None where there is none."""
    for name in ("gpus-per-node", "gpus", "gpus-per-task", "gres"):
        if not _written(options, name) or not _is_about(name, options[name]):
            continue
        text = str(options[name])
        if name == "gres":
            text = next(part for part in text.split(",") if part.startswith("gpu")).partition(":")[2] or "1"
        kind, _, number = text.rpartition(":")
        if not number.isdecimal():
            kind, number = number, "1"
        count = _count(name, number)
        if name == "gpus":
            count = math.ceil(count / resources.nodes)
        elif name == "gpus-per-task":
            count *= resources.processes or 1
        return count, kind or None
    return None


def _count(name: str, value: object) -> int:
    if str(value).isdecimal() and int(str(value)) > 0:
        return int(str(value))
    raise UserError("not a whole number above 0", key=f"resources.sbatch.{name}", value=value)


def _minutes(value: object) -> int:
    """A time limit in any of sbatch's forms: minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s; rounded up."""
    text = str(value).strip()
    if text.lower() in ("infinite", "unlimited"):
        return _UNLIMITED_MINUTES
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise UserError(
            "not a time limit",
            key="resources.sbatch.time",
            value=value,
            hint="Write minutes, minutes:seconds, hours:minutes:seconds, days-hours or days-hours:minutes:seconds.",
        )
    days, first, second, third = found.groups()
    if days is not None:  # days-hours[:minutes[:seconds]]
        return max(1, (int(days) * 24 + int(first)) * 60 + int(second or 0) + (int(third or 0) > 0))
    if third is not None:
        return max(1, int(first) * 60 + int(second) + (int(third) > 0))
    return max(1, int(first) + (int(second or 0) > 0))


def _memory(gigabytes: float) -> str:
    return f"{int(gigabytes)}G" if gigabytes == int(gigabytes) else f"{round(gigabytes * 1024)}M"
