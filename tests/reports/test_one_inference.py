"""One inference: wherever a contrast is shown, it is the same row, and that row is what other means compute."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from klab.grid import Cell
from klab.grid.score import parse_score
from klab.harness.cli.main import main
from klab.harness.store import Run
from klab.reports import Study, analyse, load_run, render
from klab.reports.across import compare_across
from klab.reports.compare_cells import compare_pair
from klab.reports.comparison import compare, run_frame
from klab.reports.study import load_runs
from klab.reports.words import difference_span, mean_span, p_number, p_words
from tests.reports.synthetic import QUICKSTART, write_run

PAIR = """
name: pair
task: {{name: addition, digits: 2}}
training: {{updates: 10, updates_per_rollout: 2, evaluate_every: 5}}
objective: {{algorithm: grpo, beta: 0.05}}
axes: {{estimator: [k1, k3]}}
seeds: {seeds}
"""
CROSSED = """
name: crossed
task: {name: addition, digits: 2}
training: {updates: 10, updates_per_rollout: 2, evaluate_every: 5}
objective: {algorithm: grpo, beta: 0.05}
axes: {estimator: [k1, k3], placement: [loss, reward], weight: [ppo_clip, power]}
seeds: 4
"""


class Tables(HTMLParser):
    """Texts of the cells of every table of a page, by the table's class."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[tuple[str, list[str]]] = []
        self.kind, self.inside = "", 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.kind = dict(attrs).get("class") or ""
        elif tag == "tr":
            self.rows.append((self.kind, []))
        elif tag in ("td", "th") and self.rows:
            self.rows[-1][1].append("")
            self.inside += 1

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside and self.rows and self.rows[-1][1]:
            self.rows[-1][1][-1] += data

    def of(self, kind: str) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for found, row in self.rows if found.split()[:1] == [kind]]


def _held_out(run: Run) -> dict[str, list[float]]:
    """By estimator the last held-out rewards, by seed, from the files."""
    found: dict[str, dict[int, float]] = {}
    for identity in run.cells:
        cell = run.cell(identity).cell()
        found.setdefault(cell.objective.estimator, {})[cell.seed] = run.cell(identity).evaluations()[-1]["reward"]
    return {name: [row[seed] for seed in sorted(row)] for name, row in found.items()}


def test_two_cells_are_scipys_paired_t_test_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "pair", PAIR.format(seeds=2))
    scores = _held_out(run)
    test = stats.ttest_rel(scores["k1"], scores["k3"])
    interval = test.confidence_interval()
    expected = (float(np.mean(np.subtract(scores["k1"], scores["k3"]))), interval.low, interval.high)
    assert main(["report", str(run.path), "--format", "json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["comparisons"]
    (row,) = found["contrasts"]
    assert (row["difference"], row["low"], row["high"], row["p"]) == pytest.approx((*expected, test.pvalue))
    text = render(run.path, tmp_path / "out", figures=False).read_text()
    (shown,) = [cells for cells in Tables(text).of("cells") if "estimator k1" in cells]
    assert difference_span(*expected) in shown
    assert p_number(test.pvalue) in shown
    assert "weak evidence" in text
    assert main(["compare", f"{run.path}:estimator k1", f"{run.path}:baseline"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert difference_span(-expected[0], -expected[2], -expected[1]) in out
    assert p_words(test.pvalue) in out


def test_a_product_is_its_error_strata(tmp_path: Path) -> None:
    """The effect of an axis of two values in a balanced product: the paired test of its margins over seeds, at Šidák's
    level of three axes that share three tenths of the error rate, its variance no less than that of what is left."""
    study = load_run(write_run(tmp_path / "crossed", CROSSED, noise=0.03).path)
    comparison = compare(study, study.tasks[0])
    names = [axis.key for axis in study.axes]
    cube = np.full((2, 2, 2, 4), np.nan)
    for group, row in zip(comparison.groups, comparison.scores, strict=True):
        base = study.values[comparison.baseline or ""]
        cube[tuple(int(study.values[group][name] != base[name]) for name in names)] = row
    levels = comparison.analysis.levels.set_index("axis")
    y = cube.reshape(8, 4) - cube.reshape(8, 4).mean(1, keepdims=True)
    codes = np.asarray(list(product(range(2), repeat=3)))
    left = y - y.mean(0)
    squares = {}
    for a in range(3):
        signs = (2 * codes[:, a] - 1)[:, None]
        squares[a] = float(8 * np.sum((signs * y).mean(0) ** 2)) / 3
        left = left - signs * (signs * y).mean(0)
    error = float(np.sum(left**2)) / 12
    for a, name in enumerate(names):
        margins = np.moveaxis(cube, a, 0).reshape(2, 4, 4).mean(1)
        difference = margins[1] - margins[0]
        row = levels.loc[name]
        assert row["difference"] == pytest.approx(difference.mean())
        if squares[a] > error:
            half = stats.t.isf((1 - (1 - 0.015) ** (1 / 3)) / 2, 3) * difference.std(ddof=1) / 2
            assert row["high"] - row["low"] == pytest.approx(2 * half)
    assert any(squares[a] > error for a in range(3))


def test_page_csv_json_markdown_latex_terminal_and_notebook_show_one_row(
    run: Run, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = load_run(run.path)
    baseline = study.values[study.baselines[study.tasks[0]]]
    frame, reference = run_frame(
        study,
        study.cells,
        np.asarray([_last(run, identity) for identity in study.cells["cell"]]),
        study.baselines[study.tasks[0]],
    )
    assert reference == dict(baseline)
    own = analyse(frame, reference)
    rows = {record["label"]: record for record in study.summary().to_dict("records")}
    by_label = {
        study.labels[group]: contrast
        for group, contrast in zip(
            [group for group in dict.fromkeys(study.cells["group"]) if group != study.baselines[study.tasks[0]]],
            own.contrasts.to_dict("records"),
            strict=True,
        )
    }
    text = page.read_text()
    head, *body = [row for row in Tables(text).of("cells") if len(row) > 8]
    cells = {row[1]: dict(zip(head, row, strict=True)) for row in body}
    table = list(csv.DictReader((page.parent / "tables" / "summary.csv").open()))
    in_csv = {row["label"]: row for row in table if row["score"] == "reward"}
    data = json.loads((page.parent / "tables" / "summary.json").read_text())["comparisons"]
    assert [(one["score"], one["task"]) for one in data] == [
        ("reward", study.tasks[0]),
        ("accuracy_final", study.tasks[0]),
    ]
    in_json = {tuple(row[axis.key] for axis in study.axes): row for row in data[0]["contrasts"]}
    capsys.readouterr()
    assert main(["report", str(run.path), "--format", "md"]) == 0
    in_md = capsys.readouterr().out
    assert main(["report", str(run.path), "--format", "latex"]) == 0
    in_latex = capsys.readouterr().out.replace("$-$", "−").replace(r"\textless{}", "<")
    for label, contrast in by_label.items():
        numbers = [contrast[name] for name in ("difference", "low", "high", "p", "verdict")]
        shown = rows[label]
        names = ("difference", "difference_low", "difference_high", "p", "verdict")
        assert [shown[name] for name in names] == pytest.approx(numbers, nan_ok=True)
        assert [float(in_csv[label][name] or "nan") for name in names[:4]] == pytest.approx(numbers[:4], nan_ok=True)
        assert in_csv[label]["verdict"] == contrast["verdict"]
        key = tuple(contrast[axis.key] for axis in study.axes)
        assert [in_json[key][name] for name in ("difference", "low", "high", "p", "verdict")] == pytest.approx(numbers)
        span, p = difference_span(*numbers[:3]), p_number(contrast["p"])
        assert [span, p, contrast["verdict"]] == [cells[label][name] for name in ("vs baseline", "p", "verdict")]
        escaped = label.replace("_", r"\_")
        assert f"| {span} | {p} | {contrast['verdict']} |" in next(
            line for line in in_md.splitlines() if line.startswith(f"| {escaped} |")
        )
        line = next(line for line in in_latex.splitlines() if line.startswith(f"{escaped} &"))
        assert f"{span}}}" in line if contrast["verdict"] == "differs" else f"& {span} &" in line
        assert f"& {p} & {contrast['verdict']} &" in line
        pair = compare_pair(study, study.baselines[study.tasks[0]], _group(study, label)).contrast
        assert [pair.difference, pair.low, pair.high, pair.p, pair.verdict] == pytest.approx(numbers)
    assert data[0]["headline"] == own.headline
    assert own.headline in " ".join(text.split())


def test_every_interval_and_p_in_sentences_is_a_row_of_the_analysis(run: Run, page: Path) -> None:
    """What reads like `+0.1 [+0.0, +0.2]` on the page is a mean, a contrast, a level, an effect or an interaction."""
    study = load_run(run.path)
    known: set[str] = set()
    for score in ("reward", "accuracy_final"):
        analysis = compare(study, study.tasks[0], score).analysis
        for name in ("contrasts", "levels", "effects", "interactions"):
            known |= {
                difference_span(row["difference"], row["low"], row["high"])
                for row in getattr(analysis, name).to_dict("records")
            }
        known |= {mean_span(row["mean"], row["low"], row["high"]) for row in analysis.cells.to_dict("records")}
    text = re.sub(r"<[^>]+>", "", re.sub(r"<(script|style|svg).*?</\1>", "", page.read_text(), flags=re.S))
    shown = set(re.findall(r"[+−]?\d\.\d{3} \[[+−]?\d\.\d{3}, [+−]?\d\.\d{3}\]", " ".join(text.split())))
    assert len(shown) > 20
    assert shown <= known


def test_with_one_seed_the_page_infers_nothing(tmp_path: Path) -> None:
    text = render(write_run(tmp_path / "one", PAIR.format(seeds=1)).path, tmp_path / "out", figures=False).read_text()
    assert "One seed per cell: nothing can be inferred" in text
    body = re.sub(r"<(script|style|svg).*?</\1>", "", text, flags=re.S)
    assert not re.search(r"\d\.\d{3} \[", body)
    assert "p =" not in body.partition('id="methods"')[0]


def test_a_crash_elsewhere_moves_no_verdict_and_a_crashed_baseline_gives_none(tmp_path: Path) -> None:
    def study(name: str, failing: Any) -> Study:
        run = write_run(
            tmp_path / name,
            QUICKSTART.replace("updates: 60", "updates: 10"),
            outcome=lambda cell: "failed" if failing(cell) else "finished",
            noise=0.005,
        )
        return load_run(run.path)

    def verdicts(study: Study) -> dict[str, str]:
        table = compare(study, study.tasks[0]).table
        return dict(zip(table["label"], table["verdict"], strict=True))

    def truncated(cell: Cell) -> bool:
        return cell.objective.weight == "truncate"

    undisturbed = study("whole", lambda cell: False)
    whole, base = verdicts(undisturbed), undisturbed.baselines[undisturbed.tasks[0]]
    some = verdicts(study("some", lambda cell: truncated(cell) and cell.seed < 2))
    none = verdicts(study("none", truncated))
    assert {label: word for label, word in some.items() if label != "weight truncate"} == {
        label: word for label, word in whole.items() if label != "weight truncate"
    }
    assert none == {**whole, "weight truncate": "undecided"}
    assert "differs" in whole.values()
    lost = study("lost", lambda cell: cell.group == base)
    assert set(verdicts(lost).values()) == {"", "undecided"}
    headline = compare(lost, lost.tasks[0]).analysis.headline
    assert headline.startswith("The baseline has no score: nothing is compared with it, and no verdict is given")


def test_the_margin_of_equivalence_is_the_users(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = {}
    for delta in ("0.001", "0.9"):
        assert main(["report", str(run.path), "--format", "csv", "--delta", delta]) == 0
        rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
        verdicts[delta] = {row["label"]: row["verdict"] for row in rows}
    assert "equivalent" not in verdicts["0.001"].values()
    assert verdicts["0.9"]["weight power"] == "equivalent"
    differing = [{label for label, word in found.items() if word == "differs"} for found in verdicts.values()]
    assert differing[0] == differing[1]


def test_two_tasks_share_the_error_rate_with_their_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        write_run(tmp_path / f"digits{digits}", PAIR.format(seeds=4).replace("digits: 2", f"digits: {digits}"))
        for digits in (2, 3)
    ]
    study = load_runs([run.path for run in runs])
    each = [compare(study, task) for task in study.tasks]
    assert [one.analysis.alpha for one in each] == pytest.approx([0.05 / 3] * 2)
    across = compare_across(study, parse_score("reward"))
    assert across is not None
    assert across.alpha == pytest.approx(0.05 / 3)
    (row,) = across.table.to_dict("records")
    scores = [_held_out(run) for run in runs]
    differences = [np.subtract(one["k1"], one["k3"]) for one in scores]
    assert row["difference"] == pytest.approx(np.mean(differences))
    assert row["label"] == "estimator k1"
    for one, difference in zip(each, differences, strict=True):
        half = stats.t.isf(0.05 / 3 / 2, 3) * difference.std(ddof=1) / 2
        contrast = one.analysis.contrasts.iloc[0]
        assert contrast["high"] - contrast["low"] == pytest.approx(2 * half)
    assert main(["report", *[str(run.path) for run in runs], "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["across"][0]["table"][0]["p"] == pytest.approx(row["p"])
    text = render([run.path for run in runs], tmp_path / "out", figures=False).read_text()
    span = difference_span(row["difference"], row["low"], row["high"])
    assert ["estimator k1", span, p_number(row["p"]), row["verdict"]] in Tables(text).of("plain")


def test_configurations_that_no_axis_tells_apart_are_still_two(tmp_path: Path) -> None:
    text = PAIR.format(seeds=3).replace("axes: {estimator: [k1, k3]}", "axes: {training.micro_batch: [null, 64]}")
    study = load_run(write_run(tmp_path / "micro", text).path)
    comparison = compare(study, study.tasks[0])
    assert len(comparison.analysis.cells) == 2
    assert comparison.analysis.contrasts["configuration"].tolist() == [comparison.groups[1][-8:]]


def test_numbers_never_read_as_the_other_side_of_the_threshold() -> None:
    assert [p_number(p) for p in (0.04999, 0.0499, 0.05, 0.0004, np.nan, 1.0)] == [
        "0.049",
        "0.049",
        "0.050",
        "<0.001",
        "–",
        "1.000",
    ]
    assert difference_span(-0.1234, -0.2, np.nan) == "−0.123 [−0.200, –]"


def _last(run: Run, identity: str) -> float:
    evaluations = run.cell(identity).evaluations()
    late = [row["reward"] for row in evaluations if row["update"] >= 0.9 * run.cell(identity).cell().training.updates]
    return float(np.mean(late)) if late else np.nan


def _group(study: Study, label: str) -> str:
    return str(study.cells.loc[study.cells["label"] == label, "group"].iloc[0])


def test_the_frame_that_is_analysed_is_tidy(run: Run) -> None:
    study = load_run(run.path)
    frame, _ = run_frame(study, study.cells, np.zeros(len(study.cells)), None)
    assert list(frame) == [*(axis.key for axis in study.axes), "seed", "score", "state"]
    assert pd.Series(frame["state"]).value_counts().to_dict() == {"finished": 37, "diverged": 2, "failed": 1}
