"""Optional packages: what needs one says so, and how it is installed, before anything is computed."""

from __future__ import annotations

from importlib import metadata

from klab.grid.errors import UserError


def require_package(distribution: str, extra: str, key: str, value: object) -> None:
    """Raises a UserError that names the extra where a distribution is not installed.

    Args:
        key, value: the setting that needs it.
    """
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"needs {distribution}, which is not installed",
            key=key,
            value=value,
            hint=f"Install it with: pip install 'klab[{extra}]'",
        ) from None
