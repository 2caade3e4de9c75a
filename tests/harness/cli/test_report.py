"""`klab report`, `klab compare`, `klab watch`: what they print, and what they say to mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from klab.harness.cli.main import main
from tests.reports.synthetic import QUICKSTART, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "quick", QUICKSTART.replace("updates: 60", "updates: 10").replace("seeds: 5", "seeds: 3"))
    write_run(folder / "other", "name: other\ntask: {name: addition, digits: 3}\ntraining: {updates: 4}\nseeds: 2\n")
    return folder


def _klab(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize(
    ("form", "expected"),
    [("md", "| weight power |"), ("latex", r"\toprule"), ("csv", "reverse_kl_final"), ("json", '"effects"')],
)
def test_a_table_on_standard_output_and_nothing_written(
    runs: Path, capsys: pytest.CaptureFixture[str], form: str, expected: str
) -> None:
    assert _klab("report", "quick", "--runs", runs, "--format", form) == 0
    assert expected in capsys.readouterr().out
    assert not (runs / "quick" / "report" / "index.html").exists()


def test_report_writes_the_page_and_prints_the_table_and_its_path(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _klab("report", "other", "--runs", runs, "--out", tmp_path / "r", "--no-figures", "--over", "tokens") == 0
    out = capsys.readouterr().out
    assert "baseline" in out
    assert out.rstrip().endswith("index.html")
    assert 'data-view="tokens"' in (tmp_path / "r" / "index.html").read_text()
    assert (tmp_path / "r" / "tables" / "summary.tex").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("report", "quick", "--format", "pdf"), "'pdf'"),
        (("report", "quick", "--over", "token"), "did you mean 'tokens'"),
        (("report", "quick", "--score", "rewrad"), "did you mean 'reward'"),
        (("report", "quick", "--metric", "reward_at_kl"), "needs a number"),
        (("report", "quick", "--score", "parts.format", "--format", "csv"), "parts.format"),
        (("report", "quick", "--baseline", "nothing"), "no such cell"),
        (("report", "nothing"), "no such run"),
        (("compare", "quick", "quick"), "RUN:CELL"),
        (("compare", "quick:baseline", "quick:baseline"), "two configurations"),
        (("compare", "quick:baseline", "quick:nothing"), "no such cell"),
        (("compare", "quick:baseline", "other:baseline"), "different tasks"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    runs: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    assert _klab(*words, "--runs", runs) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


def test_compare_in_words_and_as_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("compare", "quick:baseline", "quick:weight power", "--runs", runs)
    assert _klab(*words) == 0
    out = capsys.readouterr().out
    assert "objective.weight" in out
    assert "held-out reward, weight power against baseline" in out
    assert _klab(*words, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    by_seed = [row["second"] - row["first"] for row in data["seeds"]]
    assert data["contrast"]["difference"] == pytest.approx(sum(by_seed) / 3)
    assert data["contrast"]["pairs"] == 3


def test_watch_shows_curves_and_ends_when_nothing_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _klab("watch", "quick", "--runs", runs, "--once", "--rows", 3) == 0
    out = capsys.readouterr().out
    assert "█" in out
    assert "21 more" in out
    assert _klab("watch", "other", "--runs", runs, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)[0]["reward_mean"]) == 4
    assert _klab("watch", "other", "--runs", runs) == 0


def test_a_report_can_be_limited_to_the_cells_of_a_grid(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = QUICKSTART.replace("updates: 60", "updates: 10").replace("seeds: 5", "seeds: 2")
    (tmp_path / "fewer.yaml").write_text(text)
    words = ("report", "quick", "--runs", runs, "--out", tmp_path / "r", "--no-figures", "--no-gradients")
    assert _klab(*words, "--grid", tmp_path / "fewer.yaml") == 0
    out = capsys.readouterr().out
    assert "2/2" in out
    assert "3/3" not in out
    (tmp_path / "none.yaml").write_text(text.replace("updates: 10", "updates: 11"))
    assert _klab(*words, "--grid", tmp_path / "none.yaml") == 2
    assert "none of these cells is in the run" in capsys.readouterr().err


def test_a_report_runs_the_users_code_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "from pathlib import Path\nPath('imported').touch()\ndef soft(ratio, advantage): return ratio\n"
    (tmp_path / "klab_test_report_weights.py").write_text(code)
    axes = "axes: {weight: [ppo_clip, 'klab_test_report_weights:soft']}"
    write_run(tmp_path / "own", f"name: own\ntask: {{name: addition}}\ntraining: {{updates: 4}}\nseeds: 2\n{axes}\n")
    words = ("report", "own", "--runs", tmp_path, "--no-figures", "--json")
    assert _klab(*words) == 0
    assert not (tmp_path / "imported").exists()
    assert _klab(*words, "--measure") == 0
    assert (tmp_path / "imported").exists()
