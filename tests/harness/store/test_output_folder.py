"""What is written beside the cells stays in the run folder, and fields that become paths are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from klab.grid import UserError
from klab.harness.store import Run, files


def rewritten(run: Run, change: dict[str, Any]) -> Run:
    """The run with other entries in the record of its first cell."""
    path = run.path / "manifest.json"
    manifest = files.read_record(path)
    assert manifest is not None
    manifest["cells"][run.cells[0]] |= change
    files.replace(path, files.encode_record(manifest))
    return Run.open(run.path)


def test_a_link_in_the_place_of_an_output_folder_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    assert run.output_folder("report", "cache") == run.path / "report" / "cache"
    (run.path / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="report: is a link: nothing is written through it"):
        run.output_folder("report", "cache")


@pytest.mark.parametrize(
    "change",
    [{"group": "../../etc"}, {"group": "/tmp/x"}, {"group": ["a"]}, {"group": ""}, {"seed": "../0"}, {"seed": None}],
)
def test_fields_that_become_paths_are_checked(run: Run, change: dict[str, Any]) -> None:
    changed = rewritten(run, change)
    with pytest.raises(UserError, match=r"manifest\.json.*does not say which configuration"):
        changed.resolved(changed.cells[0])


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x\x1b[2J", "n" * 200])
def test_a_name_that_no_grid_file_can_have_is_refused(run: Run, name: str) -> None:
    path = run.path / "manifest.json"
    manifest = files.read_record(path)
    assert manifest is not None
    files.replace(path, files.encode_record(manifest | {"name": name}))
    with pytest.raises(UserError, match="which no grid file can have"):
        Run.open(run.path)
