"""`klab serve` as a process: it says where it is, imports little, ends with Ctrl-C, and names what it needs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.harness.store import Run

Ask = Callable[..., Any]

PROGRAM = """
import sys
from klab.harness.cli.main import main
code = main(sys.argv[1:])
heavy = ("torch", "transformers", "pandas", "seaborn", "matplotlib", "scipy", "numpy", "submitit", "jinja2")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def test_it_says_where_it_is_and_imports_nothing_heavy(run: Run) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "serve", str(run.path.parent), "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["url"] == f"http://127.0.0.1:{said['port']}/"
        assert f"{said['port']}:127.0.0.1:{said['port']}" in said["tunnel"]
        for path in (
            "",
            "api/runs",
            "api/runs/little/cells",
            "api/runs/little/curves",
            f"api/runs/little/cells/{run.cells[0]}",
        ):
            with urllib.request.urlopen(said["url"] + path, timeout=60) as reply:
                assert reply.status == 200
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors.strip() == "[]"


def test_words_for_people_have_the_tunnel(run: Run) -> None:
    command = [sys.executable, "-m", "klab.harness.cli.main", "serve", str(run.path.parent), "--port", "0", "--private"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        first, second, _ = (process.stdout.readline() for _ in range(3))
        url = first.split()[-1]
        assert f"is shown at {url}" in first
        assert "ssh -N -L" in second
        with urllib.request.urlopen(f"{url}api/runs", timeout=60) as reply:
            assert json.load(reply)["total"] == 1
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(url.rsplit("/", 2)[0] + "/api/runs", timeout=60)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_mistakes_are_one_message(run: Run, tmp_path: Path) -> None:
    for words, said in (
        ([str(tmp_path / "nowhere")], "there is no such folder"),
        ([str(tmp_path), "--host", "0.0.0.0"], "--private"),
        ([str(tmp_path), "--port", "70000"], "65535"),
    ):
        command = [sys.executable, "-m", "klab.harness.cli.main", "serve", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_named_with_its_extra(run: Run, package: str) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from klab.harness.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "serve", str(run.path.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"needs the package {package}" in done.stderr
    assert "klab[serve]" in done.stderr
