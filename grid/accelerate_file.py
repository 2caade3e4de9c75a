"""The configuration of accelerate that a grid file names: what kind of training it starts, and whether that can be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from klab.grid.errors import UserError

if TYPE_CHECKING:
    from klab.grid.schema.sections import Launcher, Resources

SEVERAL = ("FSDP", "DEEPSPEED", "MULTI_GPU")
"""Kinds with which `accelerate launch` starts several processes; the last one also where there are only CPUs."""

_ONE = ("NO", "MULTI_CPU")
"""Kinds with which it starts one. (Several on CPUs it would leave to MPI.)"""


def accelerate_kind(file: Path) -> str:
    """`distributed_type` of a configuration of accelerate; `NO` where it has none, as there.

    Raises:
        UserError: it is not a mapping in YAML or JSON.
    """
    import yaml

    try:
        found = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not a configuration of accelerate: {error}", file=file) from error
    if not isinstance(found, Mapping):
        raise UserError("not a configuration of accelerate: it is no mapping", file=file)
    return str(found.get("distributed_type", "NO"))


def launcher_kind(launcher: Launcher | None) -> str | None:
    """`accelerate_kind` of what starts a cell's processes; None where that is not accelerate, or cannot be read."""
    if launcher is None or launcher.accelerate is None:
        return None
    try:
        return accelerate_kind(Path(launcher.accelerate))
    except (OSError, UserError):
        return None


def check_accelerate_file(file: Path, resources: Resources) -> None:
    """Check that a configuration starts as many processes as are to train a cell together.

    Raises:
        UserError: it is none, or starts one process where there are to be several.
    """
    kind, size = accelerate_kind(file), resources.nodes * resources.processes_per_node
    if size > 1 and kind in _ONE:
        raise UserError(
            f"accelerate starts one process with this distributed_type, and {size} are to train a cell together",
            key="resources.launcher.accelerate",
            file=file,
            value=kind,
            allowed=SEVERAL,
        )
