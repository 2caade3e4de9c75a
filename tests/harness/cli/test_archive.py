"""`klab archive`, and the commands that read what it made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Grid
from klab.harness.dispatch.job import run_job
from klab.harness.store import Run, files
from klab.harness.store.archive import Archive
from klab.harness.store.digest import digest
from tests.reports.synthetic import QUICKSTART, write_run

Ask = Callable[..., Any]
MakeGrid = Callable[..., Grid]


def test_an_archive_is_reported_and_compared_as_its_run_is(ask: Ask, tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "quick", QUICKSTART.replace("updates: 60", "updates: 10").replace("seeds: 5", "seeds: 3")
    )
    said = ask("archive", str(run.path), "--out", str(tmp_path / "kept"))
    assert f"{tmp_path / 'kept'}: 24 cells, 24 of them ended" in said
    assert "stored completions out" in said
    for words in (("report", "--format", "json"), ("report", "--format", "csv", "--score", "reward_at_kl(0.2)")):
        assert ask(words[0], str(tmp_path / "kept"), *words[1:]) == ask(words[0], str(run.path), *words[1:])
    pair = [("compare", f"{folder}:baseline", f"{folder}:weight power") for folder in (run.path, tmp_path / "kept")]
    assert ask(*pair[0], "--json") == ask(*pair[1], "--json")
    assert ask("report", "kept", "--runs", str(tmp_path), "--format", "md").startswith("**addition")


def test_other_commands_say_what_an_archive_is_for(ask: Ask, tmp_path: Path) -> None:
    run = write_run(tmp_path / "quick", QUICKSTART.replace("seeds: 5", "seeds: 1"), only=lambda cell: False)
    ask("archive", str(run.path), "--out", str(tmp_path / "kept"))
    kept = str(tmp_path / "kept")
    assert "no such run" in ask("status", kept, code=2)
    assert "does not keep what trackers get" in ask("report", kept, "--track", "tensorboard", code=2)
    assert "is missing in this archive" in ask("rerun", kept, run.cells[0], code=2)
    assert "no such run" in ask("archive", kept, code=2)


@pytest.fixture
def trained(make_grid: MakeGrid, place: Path) -> Run:
    run = Run.create(place / "runs/little", make_grid(evaluate_every=2))
    run_job(run.path, tuple(run.cells), executor="here")
    return run


def test_a_cell_of_an_archive_is_repeated_bit_for_bit(trained: Run, ask: Ask, place: Path) -> None:
    ask("archive", "little")
    kept = str(place / "archives/little")
    found = ask("rerun", kept, trained.cells[0], "--json")
    assert found["same"] is True
    assert found["circumstances"] == []
    assert found["first_evaluation"]["reward"][0] == found["first_evaluation"]["reward"][1]
    said = ask("rerun", kept, trained.cells[0])
    assert "match the archived ones bit for bit (timings excluded): 4 updates, 3 evaluations." in said
    assert "repeated as they were" in ask("rerun", kept, trained.cells[0], "--set", "training.lr=1", code=2)


def _altered(trained: Run, update: int, **changes: Any) -> None:
    """Write other numbers into the stored metrics of an update."""
    folder = trained.cell(trained.cells[0])
    rows = [{**row, **changes} if row["update"] == update else row for row in folder.metrics()]
    (folder.path / "metrics.jsonl").unlink()
    folder.append_metrics(rows)


def test_where_the_numbers_differ_first_is_said(trained: Run, ask: Ask, place: Path) -> None:
    _altered(trained, 3, entropy=0.125)
    ask("archive", "little")
    said = ask("rerun", str(place / "archives/little"), trained.cells[0], code=1)
    assert "The numbers differ: metrics, update 3, entropy: 0.125 was archived, now " in said
    assert "At the last evaluation (update 4) the archive has reward" in said


def test_other_numbers_that_the_archive_does_not_keep_are_noticed(trained: Run, ask: Ask, place: Path) -> None:
    _altered(trained, 3, loss=0.125)
    ask("archive", "little")
    said = ask("rerun", str(place / "archives/little"), trained.cells[0], code=1)
    assert "The numbers differ: only in what the archive does not keep." in said


def test_another_machine_and_other_versions_are_said(trained: Run, ask: Ask, place: Path) -> None:
    folder = trained.cell(trained.cells[0])
    result = dict(folder.result() or {})
    hardware = {**result["hardware"], "processor": "a slide rule"}
    folder.write_result({**result, "hardware": hardware, "versions": {**result["versions"], "torch": "1.0"}})
    ask("archive", "little")
    said = ask("rerun", str(place / "archives/little"), trained.cells[0])
    assert "were computed with processor a slide rule, these with" in said
    assert "were made with torch 1.0, now" in said


def test_digests_see_every_bit_and_no_timing() -> None:
    rows = [{"update": 1, "x": 0.1, "seconds_step": 1.0, "parts": {"a": 1}}]
    assert digest(rows) == digest([{"parts": {"a": 1}, "x": 0.1, "update": 1, "seconds_step": 2.0}])
    for other in ({"x": 0.1 + 2**-56}, {"x": 0}, {"parts": {"a": 2}}, {"update": 2}, {"y": 0.0}):
        assert digest([{**rows[0], **other}]) != digest(rows)
    assert digest(rows) != digest([*rows, *rows])
    assert digest([{"x": float("nan")}]) == digest([{"x": float("nan")}])


def test_user_code_is_no_part_of_an_archive(trained: Run, ask: Ask, place: Path) -> None:
    manifest = trained.path / "manifest.json"
    record = files.decode_record(manifest.read_bytes(), manifest)
    record["code"] = {"./mine.py:soft": {"folder": ".", "module": "mine", "by_file": True, "files": {}}}
    manifest.write_bytes(files.encode_record(record))
    ask("archive", "little")
    assert Archive.open(place / "archives/little").name == "little"
    assert "code that no archive has: ./mine.py:soft" in ask(
        "rerun", str(place / "archives/little"), trained.cells[0], code=2
    )
