"""What is said of `verifiers` where the library is missing or another version; `tests/parity` has the rest."""

from __future__ import annotations

from importlib import metadata

import pytest

from klab.grid import UserError
from klab.tasks import load_task

SUMS = {"name": "verifiers", "environment": "my-sums"}


def found(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """As if this version of verifiers were installed, or none."""
    others = metadata.version

    def answer(name: str) -> str:
        if name != "verifiers":
            return others(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", answer)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, None)
    with pytest.raises(UserError, match=r"task\.name: needs verifiers.*pip install 'klab\[verifiers\]'"):
        load_task(SUMS)


@pytest.mark.parametrize("version", ["0.1.14", "0.3.1", "0.4.0"])
def test_versions_without_such_environments_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    found(monkeypatch, version)
    with pytest.raises(UserError, match=rf"task\.name: needs verifiers 0\.2, and {version} is installed"):
        load_task(SUMS)


def test_a_module_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, "0.2.1")
    with pytest.raises(UserError, match=r"task\.environment: there is no module 'my_sums'"):
        load_task(SUMS).split("train")
