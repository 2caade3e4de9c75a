"""The wheel has everything that klab needs, under klab's own name and no other."""

from __future__ import annotations

import json
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support import wheel

ROOMS = ("grid", "tasks", "harness", "reports")
ARCHIVES = wheel.ROOT / "grid" / "studies" / "results"
"""Results of studies, which stand in the repository only."""


@pytest.fixture(scope="module")
def files(built_wheel: Path) -> set[str]:
    """The files in the wheel."""
    with zipfile.ZipFile(built_wheel) as archive:
        return set(archive.namelist())


def test_the_list_of_packages_is_that_of_the_folders() -> None:
    listed = tomllib.loads((wheel.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(wheel.ROOT) for room in ROOMS for file in (wheel.ROOT / room).rglob("*.py")}
    assert sorted(listed) == sorted("klab." + ".".join(folder.parts) for folder in folders)


def test_every_file_of_the_rooms_is_in_the_wheel(files: set[str]) -> None:
    kinds = (".py", ".c", ".h", ".yaml", ".typed", ".j2", ".html", ".css", ".js")
    wanted = {
        f"klab/{file.relative_to(wheel.ROOT)}"
        for room in ROOMS
        for file in (wheel.ROOT / room).rglob("*")
        if file.suffix in kinds and ARCHIVES not in file.parents
    }
    assert wanted <= files
    assert not [name for name in files if name.startswith("klab/grid/studies/results")]
    for name in ("grid/studies/quickstart.yaml", "grid/algorithms/grpo.yaml", "grid/py.typed", "reports/py.typed"):
        assert f"klab/{name}" in files
    assert any(name.startswith("klab/reports/templates/") for name in files)


def test_the_wheel_takes_no_other_name(files: set[str]) -> None:
    tops = {name.partition("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"klab"}


def test_an_installation_does_without_the_repository(built_wheel: Path, tmp_path: Path) -> None:
    python = wheel.install(built_wheel, tmp_path / "environment")
    code = (
        "import importlib.util, json, klab.grid\n"
        "old = [name for name in ('grid', 'tasks', 'harness', 'reports') if importlib.util.find_spec(name)]\n"
        "print(json.dumps([old, klab.grid.__file__]))"
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    old, place = json.loads(done.stdout)
    assert old == []
    assert Path(place).is_relative_to(tmp_path)
    command = [python.with_name("klab"), "plan", "quickstart"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "35 cells = 7 configurations" in done.stdout
