"""A run folder belongs to one grid, says so, may grow, may move, and is believed only where it is undamaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from klab.grid import UserError, parse_grid
from klab.harness.store import Run, files

MakeRun = Callable[..., Run]


def test_a_run_comes_back_as_it_was_created(run: Run) -> None:
    again = Run.open(run.path)
    grid = parse_grid(run.grid_text, "little.yaml")
    assert again.cells == [cell.id for cell in grid.cells]
    assert [again.cell(identity).cell() for identity in again.cells] == list(grid.cells)
    assert (again.name, again.baseline, again.resources) == (grid.name, grid.baseline, grid.resources)
    assert again.manifest["versions"]["torch"]
    assert again.manifest["hardware"]["cores"] >= 1
    assert (run.path / "grid.yaml").read_text() == grid.text
    assert json.loads((run.path / "manifest.json").read_text())["schema"] == 1


def test_creating_it_again_changes_nothing(run: Run, make_run: MakeRun) -> None:
    before = (run.path / "manifest.json").read_bytes()
    assert make_run().cells == run.cells
    assert (run.path / "manifest.json").read_bytes() == before


def test_more_seeds_and_cells_are_added(run: Run, make_run: MakeRun) -> None:
    run.cell(run.cells[0]).write_result({"state": "finished", "updates": 8})
    grown = make_run(("seeds: 2", "seeds: 3"), ("[k1, k3]", "[k1, k2, k3]"))
    assert set(run.cells) < set(grown.cells)
    assert len(grown.cells) == 9
    assert Run.open(run.path).cell(run.cells[0]).result() == {"state": "finished", "updates": 8}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("updates: 8", "updates: 9"), "training.updates was 8, now 9"),
        (("beta: 0.05", "beta: 0.06"), "objective.beta was 0.05, now 0.06"),
        (("[k1, k3]", "[k2]"), "2 of its 4 cells"),
        (("name: little", "name: other"), "'little', not 'other'"),
    ],
)
def test_another_grid_is_refused_and_nothing_is_written(
    run: Run, make_run: MakeRun, change: tuple[str, str], said: str
) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="belongs to") as caught:
        make_run(change)
    assert said in str(caught.value)
    assert "--runs" in str(caught.value)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_grid_with_some_of_the_cells_leaves_the_run_as_it_is(run: Run, make_run: MakeRun) -> None:
    before = (run.path / "manifest.json").read_bytes()
    assert make_run(("seeds: 2", "seeds: 1")).cells == run.cells
    assert make_run(("[k1, k3]", "[k3]")).cells == run.cells
    assert (run.path / "manifest.json").read_bytes() == before


def test_settings_that_change_no_number_may_change(run: Run, make_run: MakeRun) -> None:
    changed = make_run(("{updates: 8}", "{updates: 8, checkpoint_updates: 3}"))
    assert changed.cells == run.cells
    assert changed.cell(run.cells[0]).cell().training.checkpoint_updates == 3


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, make_run: MakeRun) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a run folder"):
        make_run(path=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["nothing", "file", "folder"])
def test_opening_what_is_no_run_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=name):
        Run.open(tmp_path / name)


def test_a_run_may_move(run: Run, tmp_path: Path) -> None:
    folder = run.cell(run.cells[0])
    folder.append_metrics([{"update": 1, "reward_mean": 0.5}])
    shutil.move(run.path, tmp_path / "elsewhere")
    moved = Run.open(tmp_path / "elsewhere")
    assert moved.cell(run.cells[0]).metrics() == [{"update": 1, "reward_mean": 0.5}]
    assert str(tmp_path) not in (moved.path / "manifest.json").read_text()


def test_a_cell_is_found_by_any_part_of_its_id(run: Run) -> None:
    identity = run.cells[1]
    assert run.cell(identity[-8:]).id == identity
    with pytest.raises(UserError, match="2 cells fit"):
        run.cell("k1-")
    with pytest.raises(UserError, match="no such cell"):
        run.cell("nothing")
    with pytest.raises(UserError, match="no such cell"):
        run.cell("")


def test_a_cells_settings_lie_beside_its_numbers_as_yaml(run: Run) -> None:
    folder = run.cell(run.cells[0])
    folder.write_heartbeat({"update": 1})
    settings_ = yaml.safe_load((folder.path / "cell.yaml").read_text())
    assert settings_["schema"] == 1
    assert settings_["training"]["updates"] == 8


def test_a_strangers_manifest_cannot_lead_out_of_the_folder(run: Run) -> None:
    manifest = files.read_record(run.path / "manifest.json")
    assert manifest is not None
    manifest["cells"]["../../outside"] = manifest["cells"][run.cells[0]]
    files.replace(run.path / "manifest.json", files.encode_record(manifest))
    with pytest.raises(UserError, match="cannot be a folder"):
        Run.open(run.path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_manifest_is_a_mistake_that_names_it(run: Run, data: st.DataObject) -> None:
    file = run.path / "manifest.json"
    whole = file.read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "insert"]))
    damage = data.draw(st.binary(min_size=1, max_size=6))
    broken = {
        "cut": whole[:start],
        "flip": whole[:start] + bytes([whole[start] ^ (damage[0] or 1)]) + whole[start + 1 :],
        "insert": whole[:start] + damage + whole[start:],
    }[kind]
    try:
        file.write_bytes(broken)
        try:
            believed, said = Run.open(run.path).manifest, ""
        except UserError as error:
            believed, said = {}, str(error)
        assert believed == run.manifest or "manifest.json" in said
    finally:
        file.write_bytes(whole)
