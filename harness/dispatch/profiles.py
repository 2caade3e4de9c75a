"""What a job gets: the grid file's `resources`, then a named profile of the user's, then the flags."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from klab.grid import UserError
from klab.grid.schema.sections import Resources, load_section
from klab.grid.yaml_document import parse_yaml, read_text
from klab.harness.store.machine import home_folder


def configuration_file() -> Path:
    """The user's configuration: $KLAB_CONFIG, else klab/config.yaml in $XDG_CONFIG_HOME or ~/.config."""
    named = os.environ.get("KLAB_CONFIG")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or home_folder() / ".config") / "klab" / "config.yaml"


def profiles(file: Path | None = None) -> dict[str, dict[str, Any]]:
    """The user's named profiles: mappings with the keys of a grid file's `resources`. {} without a file.

    Raises:
        UserError: naming the file and the key.
    """
    file = file or configuration_file()
    try:
        text = read_text(file)
    except UserError:
        if not file.exists():
            return {}
        raise
    data = parse_yaml(text, file) if text.strip() else {}
    for key in data:
        if key not in ("profiles",):
            raise UserError("unknown key", file=file, value=key, allowed=["profiles"])
    named = data.get("profiles") or {}
    if not isinstance(named, dict) or not all(isinstance(value, dict) for value in named.values()):
        raise UserError("not a mapping from names to resources", file=file, key="profiles")
    for name, values in named.items():
        _check(values, file, f"profiles.{name}")
    return {str(name): values for name, values in named.items()}


def resolve_resources(
    given: Resources, flags: Mapping[str, Any] | None = None, *, profile: str | None = None, file: Path | None = None
) -> Resources:
    """The resources of a launch.

    Args:
        given: the grid file's.
        flags: what the command line says; None values are ignored.
        profile: a profile's name, instead of the one that the grid file names.
        file: the user's configuration, when it is not the ordinary one.

    A key of a higher source replaces the lower one's; only `sbatch` is merged name by name.

    Raises:
        UserError: when there is no such profile, or a value is not valid.
    """
    chosen = profile or given.profile
    values: dict[str, Any] = given.model_dump(exclude_unset=True)
    if chosen is not None:
        known = profiles(file)
        if chosen not in known:
            raise UserError(
                "no such profile",
                file=file or configuration_file(),
                key="profiles",
                value=chosen,
                allowed=list(known),
                hint="A profile is a mapping with the keys of `resources`, below `profiles` in this file.",
            )
        values = _override(values, known[chosen])
        values["profile"] = chosen
    values = _override(values, {key: value for key, value in (flags or {}).items() if value is not None})
    resolved = load_section("resources", values)
    assert isinstance(resolved, Resources)
    return resolved


def _override(lower: Mapping[str, Any], higher: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**lower, **higher}
    if isinstance(lower.get("sbatch"), Mapping) and isinstance(higher.get("sbatch"), Mapping):
        merged["sbatch"] = {**lower["sbatch"], **higher["sbatch"]}
    return merged


def _check(values: Mapping[str, Any], file: Path, key: str) -> None:
    try:
        load_section("resources", values)
    except UserError as error:
        raise error.with_location(file=file, prefix=key) from None
    if "profile" in values:
        raise UserError("a profile cannot name another one", file=file, key=f"{key}.profile")
