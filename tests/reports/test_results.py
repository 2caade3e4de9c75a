"""The document about several studies: every number is its report's, every kind of study is in it, texts stay texts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from klab.grid import UserError
from klab.harness.cli.main import main
from klab.harness.store import Run
from klab.reports import load_run, over_optimisation
from klab.reports.archive import write_archive
from klab.reports.confirmed_claims import claims_confirmation
from klab.reports.frame import records
from klab.reports.inference.power import PlannedDesign, detectable_contrast
from klab.reports.markdown import paragraph, plain, table
from klab.reports.pilot import measured_noise
from klab.reports.results_document import document
from klab.reports.results_figures import draw_pictures, pictures_in
from klab.reports.study_results import StudyResults, collect
from klab.reports.words import difference_span, mean_span, number
from tests.support import published_studies as made

Ask = Callable[..., Any]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """`ask(words…, code=0)` runs a command and gives what it printed."""

    def run(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(words) == code
        out, err = capsys.readouterr()
        return err if code else out

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    claimed = made.claimed(folder)
    return [claimed, made.tuned(folder), made.fraction(folder), made.proxied(folder), made.confirmed(folder, claimed)]


@pytest.fixture(scope="module")
def studies(runs: list[Run]) -> list[StudyResults]:
    return collect([run.path for run in runs])


@pytest.fixture(scope="module")
def text(studies: list[StudyResults]) -> str:
    return document(studies)


def _section(text: str, name: str) -> str:
    return text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def _rows(text: str, head: str) -> list[list[str]]:
    """The rows of the first table whose first column has this head."""
    lines = text.partition(f"\n| {head} | ")[2].split("\n")[2:]
    end = next(place for place, line in enumerate(lines) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[:end]]


def test_a_confirmation_stands_with_its_study(studies: list[StudyResults], text: str) -> None:
    assert [each.name for each in studies] == ["claimed", "tuned", "fraction", "proxied"]
    (again,) = studies[0].confirmations
    assert again.name == "claimed-confirm"
    assert "\n## claimed-confirm\n" not in text
    rows = _rows(_section(text, "claimed"), "cell")
    fresh = again.comparisons[0].table
    assert [row[2] for row in rows] == [mean_span(r["mean"], r["low"], r["high"]) for r in records(fresh)]
    assert "klab confirm claimed --top 2 --seeds 6" in text


def test_the_order_of_the_folders_does_not_matter_to_what_belongs_together(runs: list[Run]) -> None:
    found = collect([run.path for run in (runs[4], runs[0])])
    assert [each.name for each in found] == ["claimed"]
    (alone,) = collect([runs[4].path])
    assert alone.name == "claimed-confirm"
    assert "equivalent to the baseline" in document([alone]).partition("## The studies")[0]


def test_every_cell_has_the_numbers_of_its_report(studies: list[StudyResults], text: str) -> None:
    for each in (studies[1], studies[3]):
        rows = _rows(_section(text, each.name), "cell")
        table_of = records(each.comparisons[0].table)
        assert len(rows) == len(table_of)
        for row, record in zip(rows, table_of, strict=True):
            assert row[0].startswith(plain(record["label"]))
            assert row[1] == mean_span(record["mean"], record["low"], record["high"])
            assert row[2] == difference_span(record["difference"], record["difference_low"], record["difference_high"])
            assert row[-2:] == [number(record["reverse_kl_final"]), f"{record['n']}/{record['seeds']}"]


def test_a_long_table_ends_with_how_many_are_left_and_keeps_the_baseline(
    studies: list[StudyResults], text: str
) -> None:
    fraction = studies[2]
    rows = _rows(_section(text, "fraction"), "cell")
    assert len(rows) == 16
    assert f"And {len(fraction.comparisons[0].table) - 16} more: `klab report {fraction.place}`." in text
    assert fraction.comparisons[0].baseline is not None
    assert rows[-1][0].startswith("baseline")
    assert len(fraction.comparisons[0].table.head(16)) == 16
    assert fraction.comparisons[0].baseline not in fraction.comparisons[0].table.head(16)["group"].tolist()


def test_claims_have_their_effects_and_how_they_stand_is_counted(studies: list[StudyResults], text: str) -> None:
    rows = _rows(_section(text, "claimed"), "claim")
    for row, claim in zip(rows, studies[0].claims, strict=True):
        (only,) = claim.rows
        assert claim.claim in row[0]
        assert row[2] == difference_span(only.estimate, only.low, only.high)
        assert row[3] == f"{only.verdict}: {only.finding} (n = {only.n})"
    assert "Somebody 2025" in rows[0][0]
    assert "claimed: of 2 claims 2 hold here." in text.partition("## The studies")[0]


def test_claims_on_fresh_seeds_lead_beside_the_best_cells(runs: list[Run], tmp_path: Path) -> None:
    grid, record = claims_confirmation(load_run(runs[0].path), False, 3, "claimed-confirm-claims")
    run = Run.create(tmp_path / grid.name, grid, runs[0].created)
    with run.lock():
        run.grow((), **record)
    made.fill(run)
    (found,) = collect([runs[0].path, run.path, runs[4].path])
    assert [each.name for each in found.confirmations] == ["claimed-confirm-claims", "claimed-confirm"]
    text = document([found])
    lead = text.partition("## The studies")[0]
    (row,) = found.confirmations[0].claims[0].rows
    span = difference_span(row.estimate, row.low, row.high)
    assert "- **Holds here**: k1 is a bad loss (Somebody 2025). Study claimed" in lead
    assert f"addition(digits=1): {span}, 3 seeds." in lead
    assert "is equivalent to the baseline" in lead
    section = _section(text, "claimed")
    claims = _rows(section, "claim")
    assert [row[4] for row in claims] == [
        difference_span(row.estimate, row.low, row.high) for each in found.confirmations[0].claims for row in each.rows
    ]
    assert claims[0][2] != claims[0][4]
    assert "klab confirm claimed --claims --seeds 3\nklab confirm claimed --top 2 --seeds 6" in section


def test_costs_are_those_of_the_attempts(text: str) -> None:
    rows = {row[0]: row for row in _rows(text, "study")}
    assert rows["claimed"][1:5] == ["30", "0–4", "30 h 00 min", "60.00 core-hours"]
    assert rows["claimed"][7:] == ["2025-06-15", "klab 0.1.0, torch 2.9.0"]
    assert rows["claimed-confirm"][1:3] == ["18", "2000000–2000005"]
    assert list(rows) == ["claimed", "claimed-confirm", "tuned", "fraction", "proxied"]


def test_each_kind_of_study_says_its_own(studies: list[StudyResults], text: str) -> None:
    tuned, fraction, proxied = (_section(text, name) for name in ("tuned", "fraction", "proxied"))
    assert "Every configuration chose training.lr by the held-out reward on 2 tuning seeds" in tuned
    assert _rows(tuned.partition("### Tuned settings")[2], "cell") == [
        ["baseline", "training.lr=0.0003"],
        ["estimator k1", "training.lr=0.0003"],
    ]
    assert "4 cells were held out and predicted." in fraction
    frame = over_optimisation.table(studies[3].study, studies[3].comparisons[0])
    rows = _rows(proxied.partition("Over-optimisation. ")[2], "cell")
    assert rows == [over_optimisation.texts(row) for row in records(frame)]
    assert frame["root_kl_most"].to_numpy() == pytest.approx(np.sqrt(0.2))
    assert (frame["gold_most"] / frame["gold_final"]).to_numpy() == pytest.approx(1.1)
    claimed = _section(text, "claimed")
    assert "Pairs of axes that act together: 1 of 1 differ" in claimed
    assert "the strongest rank correlation with the score is that of the relative bias" in claimed
    assert _rows(claimed, "number of the exact lab")[0][0] == "relative bias"


def test_what_a_study_could_have_seen_is_what_a_plan_with_its_noise_says(
    studies: list[StudyResults], text: str
) -> None:
    claimed = studies[0]
    noise, _ = measured_noise(claimed.run.path, None)
    crossed = (("estimator", 3), ("placement", 2))
    least = detectable_contrast(PlannedDesign((6,), len(claimed.study.conduct.stated), crossed), 5, noise)
    assert f"With 5 seeds and the spread of these runs a difference of {number(least)} to the baseline" in text
    assert "is found with probability 0.8" not in _section(text, "fraction")


def test_archives_give_the_document_of_their_runs(runs: list[Run], text: str, tmp_path: Path) -> None:
    for run in runs:
        write_archive(run, tmp_path / run.name)
    found = document(collect([tmp_path / run.name for run in runs]))
    assert "klab rerun" in found
    kept = [line for line in found.split("\n") if "klab " not in line and "is read from an archive" not in line]
    own = [line for line in text.split("\n") if "klab " not in line]
    assert [line for line in kept if line] == [line for line in own if line]


def test_the_command_writes_the_document_and_few_small_figures(runs: list[Run], tmp_path: Path, ask: Ask) -> None:
    out = tmp_path / "docs" / "RESULTS.md"
    figures = tmp_path / "docs" / "figures"
    (figures / "proxied").mkdir(parents=True)
    (figures / "proxied" / "old.png").write_bytes(b"old")
    words = (str(runs[3].path), "--out", str(out), "--title", "Two [studies](x)", "--figures", str(figures))
    assert ask("results", *words) == f"{out}: 1 studies\n"
    text = out.read_text()
    assert text.startswith("# Two \\[studies\\](x)\n")
    shown = re.findall(r"!\[[^\]]*\]\((.*?)\)", text)
    assert shown == [f"figures/proxied/{file.name}" for file in sorted((figures / "proxied").iterdir())]
    assert "figures/proxied/over-optimisation.png" in shown
    assert all((out.parent / name).stat().st_size < 60_000 for name in shown)
    assert text == document(collect([runs[3].path]), "Two [studies](x)", pictures_in(figures, out.parent))
    assert "no such run" in ask("results", str(tmp_path / "nothing"), code=2)
    assert ask("results", str(runs[3].path)).startswith("# What the studies found")


def test_nothing_is_no_document() -> None:
    with pytest.raises(UserError, match="name at least one"):
        collect([])


def test_texts_of_anybody_stay_texts() -> None:
    assert plain("a [0.1, 0.2] | b") == "a [0.1, 0.2] \\| b"
    assert plain("[x](javascript:1) <img>") == "\\[x\\](javascript:1) \\<img>"
    assert plain("two\nlines") == "two lines"
    assert plain("loss_corrected, _loud_ and x_") == "loss_corrected, \\_loud\\_ and x\\_"
    assert plain("p <0.001 > 0") == "p <0.001 > 0"
    assert paragraph("# no heading") == ["\\# no heading", ""]
    assert paragraph("", "") == []
    assert table(("a",), []) == []
    assert table(("a", "b"), [("x|y", "1")], numbers=1) == ["| a | b |", "|---|---:|", "| x\\|y | 1 |", ""]


def test_figures_are_bounded(studies: list[StudyResults], tmp_path: Path) -> None:
    draw_pictures([studies[0]], tmp_path)
    assert 2 <= len(pictures_in(tmp_path, tmp_path)["claimed"]) <= 4
