"""The user's code is found whatever it is called, and shadows nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from klab.grid import UserError
from klab.grid.user_code import load, locate, names_user_code, searching


def python(folder: Path, code: str, *options: str, **environment: str) -> str:
    """What a fresh interpreter in this folder prints."""
    done = subprocess.run(
        [sys.executable, *(options or ("-P",)), "-c", textwrap.dedent(code)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def write(folder: Path, **sources: str) -> None:
    """Files by their path, with `__` for `/`; "package" stands for `__init__.py`."""
    for name, text in sources.items():
        path = folder / (name.replace("__", "/").replace("package", "__init__") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("my.weights:soft", True),
        ("weights:Outer.inner", True),
        ("./weights.py:soft", True),
        ("../my-weights.py:soft", True),
        ("/somewhere/weights.py:soft", True),
        ("ppo_clip", False),
        ("my.weights:", False),
        ("my-weights:soft", False),
        ("./weights:soft", False),
        (None, False),
    ],
)
def test_what_names_user_code(name: object, is_one: bool) -> None:
    assert names_user_code(name) is is_one


@pytest.mark.parametrize("module", ["queue", "yaml", "tasks", "klab_test_free"])
def test_a_module_of_any_name_is_the_users_and_shadows_nothing(module: str, tmp_path: Path) -> None:
    write(tmp_path, **{module: "import yaml, queue\nused = yaml.safe_load('[1]')\ndef soft(): return 'mine'"})
    code = f"""
        import sys
        from klab.grid.user_code import load
        soft = load("{module}:soft")
        import queue, yaml
        assert "site-packages" in yaml.__file__ and hasattr(queue, "SimpleQueue")
        print(soft(), sys.path[-1])
    """
    assert python(tmp_path, code) == f"mine {tmp_path}"


def test_a_package_with_the_name_of_an_installed_one_imports_itself(tmp_path: Path) -> None:
    write(
        tmp_path,
        yaml__package="",
        yaml__words="WORD = 'mine'",
        yaml__deep__package="",
        yaml__deep__weights="""
            import yaml.words
            from yaml.words import WORD
            from yaml import words
            from ..words import WORD as again
            import aside
            def soft(): return [yaml.words.WORD, WORD, words.WORD, again, aside.WORD]
        """,
        aside="from yaml import safe_load\nWORD = safe_load('beside')",
    )
    code = "from klab.grid.user_code import load; print(load('yaml.deep.weights:soft')())"
    assert python(tmp_path, code) == "['mine', 'mine', 'mine', 'mine', 'beside']"


def test_a_file_is_relative_to_the_grid_file_and_imports_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path, studies__queue="import klab_test_aside\nfrom . import queue\ndef soft(): return klab_test_aside.WORD"
    )
    write(tmp_path, studies__klab_test_aside="WORD = 'beside'")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"weight: there is no file .*/queue\.py"):
        load("./queue.py:soft", "weight")
    with searching(tmp_path / "studies"):
        assert load("./queue.py:soft")() == "beside"
        assert load("../studies/queue.py:soft")() == "beside"
        assert locate("./queue.py:soft").source == tmp_path / "studies" / "queue.py"
    assert load(f"{tmp_path}/studies/queue.py:soft")() == "beside"


def test_two_files_of_the_same_name_are_two_modules(tmp_path: Path) -> None:
    write(tmp_path, a__weights="def soft(): return 'a'", b__weights="def soft(): return 'b'")
    with searching(tmp_path):
        assert (load("./a/weights.py:soft")(), load("./b/weights.py:soft")()) == ("a", "b")


def test_an_optional_package_is_not_taken_from_the_working_folder(tmp_path: Path) -> None:
    write(tmp_path, weights="def soft(): pass", klab_test_optional="raise RuntimeError('not this one')")
    code = """
        from klab.grid.user_code import is_installed, load
        load("weights:soft")
        print(is_installed("klab_test_optional"), is_installed("yaml"))
    """
    assert python(tmp_path, code) == "False True"


@pytest.mark.parametrize("entry", ["", ".", "HERE"])
def test_the_working_folder_leaves_the_front_of_the_path(entry: str, tmp_path: Path) -> None:
    entry = str(tmp_path) if entry == "HERE" else entry
    (tmp_path / "kept").mkdir()
    code = """
        import os, sys
        from klab.grid.user_code import leave_out_working_folder
        leave_out_working_folder()
        here = os.getcwd()
        print([each for each in sys.path if os.path.realpath(each or here) == here], os.environ["PYTHONPATH"])
    """
    kept = str(tmp_path / "kept")
    assert python(tmp_path, code, "-u", PYTHONPATH=os.pathsep.join([entry, kept])) == f"[] {kept}"


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, klab_test_weights="def soft(): pass", klab_test_broken="import klab_test_absent\ndef soft(): pass")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"did you mean 'klab_test_weights:soft'"):
        load("klab_test_weights:sofd", "weight")
    with pytest.raises(UserError, match=r"weight: there is no module 'klab_test_nothing' .*\./file\.py:name"):
        load("klab_test_nothing:soft", "weight")
    with pytest.raises(ModuleNotFoundError, match="klab_test_absent"):
        load("klab_test_broken:soft", "weight")
