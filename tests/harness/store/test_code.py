"""A run keeps the user's code that made it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from klab.grid import UserError, load_grid
from klab.grid.user_code import load, searching
from klab.harness.store import Run

GRID = {
    "name": "mine",
    "task": {"name": "klab_test_pack.tasks:Mine"},
    "policy": {"name": "tiny"},
    "axes": {"weight": ["ppo_clip", "./weights.py:soft"]},
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A grid file with a task by import path, a weight by file, and what these import."""
    package = tmp_path / "klab_test_pack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tasks.py").write_text("import json, queue\nfrom .words import WORD\nclass Mine: word = WORD\n")
    (package / "words.py").write_text("from klab_test_beside import WORD\n")
    (package / "unused.py").write_text("")
    (tmp_path / "klab_test_beside.py").write_text("WORD = 'old'\n")
    (tmp_path / "queue.py").write_text("raise RuntimeError('not this one')\n")
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/weights.py").write_text("from . import json\ndef soft(): return json.WORD\n")
    (tmp_path / "studies/json.py").write_text("WORD = 'old'\n")
    (tmp_path / "studies/mine.yaml").write_text(json.dumps(GRID))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(project: Path) -> Run:
    return Run.create(project / "runs/mine", load_grid(project / "studies/mine.yaml"))


def used(run: Run) -> list[str]:
    with searching(known=run.user_code()):
        return [load("klab_test_pack.tasks:Mine").word, load("./weights.py:soft")()]


def test_the_manifest_has_what_the_code_imports_and_no_more(run: Run) -> None:
    found = {name: list(record["files"]) for name, record in run.manifest["code"].items()}
    package = [f"klab_test_pack/{name}.py" for name in ("__init__", "tasks", "words")]
    assert found == {
        "klab_test_pack.tasks:Mine": ["klab_test_beside.py", *package],
        "./weights.py:soft": ["json.py", "weights.py"],
    }


def test_code_is_the_users_own_while_it_is_unchanged_and_the_copy_afterwards(run: Run, project: Path) -> None:
    places = [location.folder for location in run.user_code().values()]
    assert places == [project, project / "studies"]
    assert used(run) == ["old", "old"]
    (project / "klab_test_beside.py").write_text("WORD = 'new'\n")
    (project / "studies/json.py").unlink()
    assert all(location.folder.is_relative_to(run.path) for location in Run.open(run.path).user_code().values())
    assert used(Run.open(run.path)) == ["old", "old"]


def test_a_run_that_moves_alone_takes_its_code_along(
    run: Run, project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("disk") / "mine"
    shutil.move(run.path, elsewhere)
    assert used(Run.open(elsewhere)) == ["old", "old"]


def test_code_that_is_gone_is_named(run: Run, project: Path) -> None:
    shutil.rmtree(run.path / "code")
    (project / "klab_test_beside.py").unlink()
    with pytest.raises(UserError, match=r"klab_test_beside\.py: the code that this run was made with has changed"):
        run.user_code()


@pytest.mark.parametrize(
    "entry",
    [
        {"folder": 5},
        {"module": "../secret"},
        {"files": {"../../secret.py": "0"}},
        {"files": {"/etc/passwd": "0"}},
        {"files": []},
    ],
)
def test_a_strangers_record_that_leads_out_of_the_run_is_refused(run: Run, entry: dict[str, object]) -> None:
    record = run.manifest["code"]["klab_test_pack.tasks:Mine"]
    run.manifest["code"]["klab_test_pack.tasks:Mine"] = {**record, **entry}
    with pytest.raises(UserError, match=r"manifest\.json.*code"):
        run.user_code()
