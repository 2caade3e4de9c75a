"""What was stated beforehand stands in the report beside what it does, and a growing study keeps its error rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from klab.grid import UserError, parse_grid
from klab.harness.cli.main import main
from klab.harness.store import Run
from klab.reports import load_run, render
from klab.reports.comparison import compare, compare_all
from klab.reports.conduct import beforehand, items
from klab.reports.inference.error_rate import ALPHA, look_share
from klab.reports.methods import methods
from klab.reports.pilot import measured_noise
from tests.reports.synthetic import QUICKSTART, write_run

TEXT = QUICKSTART.replace("updates: 60", "updates: 10").replace(
    QUICKSTART[QUICKSTART.index("  weight:") : QUICKSTART.index("seeds: 5")], ""
)
"""The quickstart with five configurations and short runs."""
STATED_TEXT = """
analysis:
  score: accuracy
  delta: 0.02
  contrasts: [{placement: none}, {estimator: k1}]
  stop: {seeds: 10}
"""


def _page(run: Run, folder: Path) -> str:
    return render(run.path, folder, figures=False).read_text()


def _stated(text: str, folder: Path) -> Run:
    """The run of a grid text whose cells have not run yet."""
    return Run.create(folder, parse_grid(text, "quickstart.yaml"))


def test_the_stated_analysis_is_what_the_report_does(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TEXT + STATED_TEXT)
    study = load_run(run.path)
    (comparison,) = compare_all(study)
    assert (comparison.score.name, comparison.analysis.delta) == ("accuracy", 0.02)
    table = comparison.table.set_index("label")
    assert set(table.index[table["stated"]]) == {"placement none", "estimator k1"}
    share = look_share((5,), 10)
    assert comparison.analysis.alpha == pytest.approx(ALPHA * share)
    plain = write_run(tmp_path / "plain", TEXT)
    (other,) = compare_all(load_run(plain.path), None)
    assert (other.score.name, other.analysis.alpha) == ("reward", ALPHA)
    assert not other.table["stated"].any()


def test_stated_contrasts_have_most_of_the_error_rate_on_the_page(tmp_path: Path) -> None:
    text = TEXT + STATED_TEXT.replace("  stop: {seeds: 10}\n", "")
    studies = [load_run(write_run(tmp_path / name, each).path) for name, each in (("run", text), ("plain", TEXT))]
    stated, plain = (compare(study, study.tasks[0], "accuracy").table.set_index("label") for study in studies)
    ratio = (stated["difference_high"] - stated["difference_low"]) / (
        plain["difference_high"] - plain["difference_low"]
    )
    assert ratio[stated["stated"]].max() < 1 < ratio[~stated["stated"]].min()


def test_every_decision_is_stated_kept_or_chosen_after_looking(tmp_path: Path) -> None:
    study = load_run(_stated(TEXT + "analysis: {delta: 0.02}\n", tmp_path / "run").path)
    history = study.conduct.versions[0][1]
    kept = {item.what: item.verdict for item in items(history, "reward", 0.02, 4)}
    assert kept["margin of equivalence"] == "as stated"
    assert kept["score"] == kept["contrasts"] == kept["seeds"] == "chosen after looking"
    other = {item.what: item.verdict for item in items(history, "reward", 0.1, 4)}
    assert other["margin of equivalence"] == "changed after looking"


def test_a_plan_that_changed_after_looking_is_shown_with_both_versions(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TEXT + "analysis: {delta: 0.02, contrasts: [{estimator: k1}]}\n")
    changed = _stated(TEXT + "analysis: {delta: 0.3, contrasts: [{placement: none}]}\n", run.path)
    study = load_run(changed.path)
    (comparison,) = compare_all(study)
    assert comparison.analysis.delta == 0.3
    table = comparison.table.set_index("label")
    assert list(table.index[table["stated"]]) == ["estimator k1"]  # what was stated beforehand stays so
    history = study.conduct.versions[0][1]
    assert beforehand(history).plan is not None
    rows = {item.what: item.verdict for item in items(history, "reward", 0.3, 4)}
    assert rows["margin of equivalence"] == "changed after looking"
    assert any("was changed after 25 of its runs had results" in note for note in study.notes)
    page = _page(changed, tmp_path / "report")
    for words in (
        "Stated beforehand",
        "±0.02",
        "changed after looking",
        "delta: 0.02",
        "delta: 0.3",
        history[0].digest[:16],
    ):
        assert words in page


def test_a_plan_that_came_after_the_results_is_no_plan(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TEXT)
    study = load_run(_stated(TEXT + "analysis: {contrasts: [{estimator: k1}]}\n", run.path).path)
    assert study.conduct.stated == frozenset()
    assert "only after runs had results" in methods(study, compare_all(study))[-1]


def test_the_methods_paragraph_says_whether_anything_was_stated(tmp_path: Path) -> None:
    plain = load_run(write_run(tmp_path / "plain", TEXT).path)
    assert "No analysis was stated before the study ran" in methods(plain, compare_all(plain))[-1]
    stated = load_run(write_run(tmp_path / "run", TEXT + STATED_TEXT).path)
    digest = stated.conduct.versions[0][1][0].digest
    assert digest[:16] in methods(stated, compare_all(stated))[-1]


def test_seeds_that_were_added_after_looking_cost_their_share_of_the_error_rate(tmp_path: Path) -> None:
    few = TEXT.replace("seeds: 5", "seeds: 3")
    write_run(tmp_path / "run", few)
    grown = write_run(tmp_path / "run", few.replace("seeds: 3", "seeds: 6"))
    study = load_run(grown.path)
    assert study.conduct.share == pytest.approx(look_share((3, 6), 6))
    assert study.conduct.share < 1
    assert any("3 and 6 of at most 6 seeds per cell" in note for note in study.notes)
    assert any("was not stated beforehand" in note for note in study.notes)


def test_a_pilot_says_how_much_runs_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The synthetic score of a run is its cell's plus a shift per seed plus noise that is known."""
    pilot = write_run(tmp_path / "runs" / "pilot", TEXT, noise=0.05)
    noise, words = measured_noise(pilot.path, None)
    assert noise.run == pytest.approx(0.05, rel=0.35)
    assert "held-out reward in quickstart" in words
    file = tmp_path / "new.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(TEXT), "name": "new"}, sort_keys=False))
    options = ["--runs", str(tmp_path / "runs"), "--no-check", "--no-merge", "--detect", "0.05"]
    assert main(["plan", str(file), *options, "--pilot", "pilot"]) == 0
    assert f"standard deviation of runs of one cell: {noise.run:.3g} (of the held-out reward" in capsys.readouterr().out


def test_a_pilot_with_one_seed_says_nothing(tmp_path: Path) -> None:
    pilot = write_run(tmp_path / "pilot", TEXT.replace("seeds: 5", "seeds: 1"))
    with pytest.raises(UserError, match="at least two seeds"):
        measured_noise(pilot.path, None)
