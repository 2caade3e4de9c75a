"""The results that stand in the repository: the document is that of its archives, and a cell gives its numbers again.

Where the repository has no archives yet, both are tested on archives that are made here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from klab.grid import parse_grid
from klab.harness.cli.main import main
from klab.harness.dispatch.job import run_job
from klab.harness.store import Run, machine
from klab.harness.store.archive import Archive
from klab.reports.archive import write_archive
from klab.reports.archived_cell import archived_cell
from klab.reports.results_document import document
from klab.reports.results_figures import pictures_in
from klab.reports.study_results import collect

ROOT = Path(__file__).resolve().parents[1]
PLACE = Path("grid/studies/results")
DOCUMENT = Path("grid/studies/RESULTS.md")
FIGURES = PLACE / "figures"
PREFACE = PLACE / "preface.md"
STUDY = """
name: small
description: A study that takes a second.
task: {name: strings, length: 2}
policy: {name: tiny}
training: {updates: 3, prompts: 2, group_size: 2, evaluate_every: 1, evaluation_prompts: 4, evaluation_samples: 2}
objective: {algorithm: grpo, beta: 0.05}
axes: {estimator: [k1, k3]}
seeds: 2
"""
REWARD, KL = 0.2, 0.1
"""How far the first evaluation, of the policy that cells start from, may be off on another make of machine."""


def _archives(root: Path) -> list[Path]:
    return sorted(file.parent.relative_to(root) for file in (root / PLACE).glob("*/archive.json"))


def _made(root: Path) -> Path:
    """A folder with an archive and its document, as `make studies` and `make results` leave them."""
    run = Run.create(root / "runs/small", parse_grid(STUDY, root / "small.yaml"))
    run_job(run.path, tuple(run.cells), executor="here")
    write_archive(run, root / PLACE / "small")
    (root / PREFACE).write_text("Two estimators, for the *test*.\n")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ROOT if _archives(ROOT) else _made(tmp_path_factory.mktemp("root"))


@pytest.fixture
def there(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(root)
    if root != ROOT:
        places = [str(path) for path in _archives(root)]
        options = ["--out", str(DOCUMENT), "--figures", str(FIGURES), "--preface", str(PREFACE)]
        assert main(["results", *places, *options]) == 0
        assert "for the *test*." in DOCUMENT.read_text()
    return root


def test_the_document_is_that_of_the_archives(there: Path) -> None:
    studies, pictures = collect(_archives(there)), pictures_in(FIGURES, DOCUMENT.parent)
    assert DOCUMENT.read_text() == document(studies, pictures=pictures, preface=PREFACE.read_text())


def test_what_the_document_shows_is_there_and_small(there: Path) -> None:
    shown = re.findall(r"!\[[^\]]*\]\((.*?)\)", DOCUMENT.read_text())
    files = [(DOCUMENT.parent / name).resolve() for name in shown]
    assert files
    assert all(file.stat().st_size < 100_000 for file in files)
    for archive in _archives(there):
        kept = [file for file in archive.iterdir() if file.is_file()]
        assert sum(file.stat().st_size for file in kept) < 2_000_000, archive


def _cheapest(archives: list[Path]) -> tuple[Path, str]:
    """The archive and the cell that took the fewest seconds."""
    found = []
    for path in archives:
        cells = Archive.open(path).table("cells")
        rows = zip(cells["cell"], cells["state"], cells["seconds"], strict=True)
        found += [(float(seconds), path, str(cell)) for cell, state, seconds in rows if state == "finished"]
    _, path, cell = min(found)
    return path, cell


def test_a_cell_trained_again_gives_its_numbers(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bits on the same make of machine and versions; elsewhere the evaluation before the first update, which
    a starting policy of other last digits gives, is near the archived one."""
    path, cell = _cheapest(_archives(there))
    capsys.readouterr()
    code = main(["rerun", str(path), cell, "--json"])
    found = json.loads(capsys.readouterr().out)
    stored = archived_cell(Archive.open(path), cell)
    here = machine.hardware()
    alike = all(stored.hardware[name] == here[name] for name in ("processor", "kernels"))
    if alike and not any("made with" in line for line in found["circumstances"]):
        assert found["same"], found["first"]
        assert code == 0
        return
    print(f"another make of machine or other versions: {found['circumstances']}")
    first = found["first_evaluation"]
    for name, most in (("reward", REWARD), ("accuracy", REWARD), ("reverse_kl", KL)):
        before, now = first[name]
        assert now == pytest.approx(before, abs=most), name


def test_what_the_readme_quotes_is_what_the_document_says() -> None:
    section = (ROOT / "README.md").read_text().partition("## What studies found")[2].partition("\n## ")[0]
    quoted = re.findall(r"[+−]\d+\.\d{3} \[[^\]]*\]", section)
    assert len(quoted) >= 3
    fresh = (ROOT / DOCUMENT).read_text().partition("## What fresh seeds established")[2].partition("\n## ")[0]
    assert [each for each in quoted if each not in fresh] == []
