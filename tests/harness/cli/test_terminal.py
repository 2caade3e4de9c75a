"""Data never commands the terminal, names can be copied, and any terminal will do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from klab.grid import Grid
from klab.harness.cli.main import main
from klab.harness.cli.table import show
from klab.harness.cli.text import printable
from klab.harness.store import Run

EVIL = "\x1b]0;owned\x07\x1b[31mred\x9b2J\x00 [bold]loud[/bold] [link=http://x]here[/link]"
COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@pytest.fixture
def run(make_grid: Callable[..., Grid], place: Path) -> Run:
    """A run whose every text that a job writes is hostile."""
    run = Run.create(place / "runs/little", make_grid(seeds=2))
    failed, finished = map(run.cell, run.cells)
    failed.append_attempt({"event": EVIL, "at": 1.0, "host": EVIL, "log": "jobs/1_log.err", EVIL: EVIL})
    failed.record_failure(f"Traceback\nValueError: {EVIL}")
    run.jobs.mkdir(exist_ok=True)
    (run.jobs / "1_log.err").write_text(EVIL)
    finished.write_result({"state": "finished", "updates": 4, "reward_final": 0.5, "note": EVIL})
    return run


@pytest.mark.parametrize(
    "words",
    [
        ["status", "little", "--all"],
        ["logs", "little", "CELL"],
        ["logs", "little", "CELL", "--json"],
        ["watch", "little", "--once"],
        ["status", EVIL],
        ["logs", "little", EVIL],
    ],
)
def test_control_characters_never_reach_the_terminal(
    run: Run, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main([run.cells[0] if word == "CELL" else word for word in words])
    out, err = capsys.readouterr()
    assert not COMMANDS.search(out + err)


def test_markup_in_data_is_text(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    main(["logs", "little", run.cells[0]])
    assert capsys.readouterr().out.count("[bold]loud[/bold]") >= 3


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b[0m\tb\nc\x9b") == "a\\x1b[0m\tb\nc\\x9b"


def test_names_are_never_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name = "k3-loss-token-ppo_clip-group_norm-" * 4
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show(("cell", "state", "", "detail"), [(name, "failed", 3, "word " * 30), ("short", "failed", 4, "")])
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("words", [["status", "little"], ["plan", "little.yaml", "--no-check"], ["axes", "--json"]])
def test_a_terminal_without_unicode_gets_what_it_can_show(run: Run, words: list[str], place: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-P", "-m", "klab.harness.cli.main", *words]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True)
    assert b"Traceback" not in done.stderr
    assert done.returncode in (0, 1)
    text = done.stdout.decode("ascii")
    if "--json" in words:
        assert "κ" in json.dumps(json.loads(text), ensure_ascii=False)


@pytest.mark.parametrize(
    "words", [["status", "little"], ["plan", "little.yaml", "--no-check"], ["launch", "little.yaml", "--dry-run"]]
)
def test_a_user_without_home_or_account(
    run: Run, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_such_user(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", no_such_user)
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "KLAB_CACHE", "KLAB_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    assert main(words) in (0, 1)
    assert capsys.readouterr().out
