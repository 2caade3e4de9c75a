"""The page: it says what was computed, hides nothing, trusts no text, and needs no network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from klab.grid import Cell
from klab.harness.store import Run
from klab.reports import Study, load_run, render
from klab.reports.comparison import compare
from klab.reports.findings import find
from klab.reports.words import p_number
from tests.reports.conftest import HOSTILE
from tests.reports.synthetic import write_run

Small = Callable[..., Run]
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Outline(HTMLParser):
    """Texts of table cells, ids, tags and links; complains about tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("href", "src", "xlink:href"):
                self.links.append(value or "")
            if key.startswith("on"):
                self.handlers.append(key)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if ("td" in self.open or "th" in self.open) and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data


@pytest.fixture(scope="module")
def outline(page: Path) -> Outline:
    return Outline(page.read_text())


def test_every_number_of_the_summary_is_on_the_page(outline: Outline, study: Study) -> None:
    rows = {row[1]: row for row in outline.rows if len(row) > 8}
    for record in study.summary().to_dict("records"):
        row = " ".join(rows[record["label"]])
        for name in ("mean", "low", "high", "reverse_kl_final", "accuracy_final"):
            assert f"{record[name]:.3f}" in row
        assert f"{record['finished']}/{record['seeds']}" in row
        if record["label"] != "baseline":
            assert f"{record['difference']:+.3f}".replace("-", "−") in row
            assert p_number(record["p"]) in row
            assert record["verdict"] in row


def test_the_first_screen_answers(page: Path, outline: Outline) -> None:
    headline = next(heading for heading in outline.headings if "Best is" in heading)
    assert headline.startswith("training.lr (0.0001 against 0.0003: −0.20")
    assert "made the difference. Best is placement none with a mean of 0.7" in headline
    text = page.read_text()
    assert "2 diverged, 1 failed of 40 runs." in text
    assert {"Best cells", "Which axes matter", "What was lost", "How much evidence"} <= set(outline.headings)


def test_a_coefficient_that_moves_is_drawn_for_the_cells_that_have_it(tmp_path: Path) -> None:
    text = """
name: moving
task: {name: addition, digits: 2}
training: {updates: 10, updates_per_rollout: 2, evaluate_every: 5}
objective: {algorithm: grpo, beta: 0.05}
design: list
cells: [{}, {training.beta_control: {target: 0.1}}]
seeds: 2
"""
    found = render(write_run(tmp_path / "moving", text).path, tmp_path / "report", figures=False).read_text()
    assert found.count("<figcaption>KL to the behaviour policy ") == 2
    assert found.count("<figcaption>β ") == 1
    assert "coefficient of the trust region" not in found
    assert "beta_control adaptive(target=0.1)" in found
    assert "training.beta_control.horizon" in found


def test_untrusted_texts_stay_texts(page: Path, outline: Outline) -> None:
    text = page.read_text()
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "{{ 7*7 }}" in text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text
    assert outline.tags.count("script") == 1
    assert outline.handlers == []


def test_the_page_needs_nothing_else(page: Path, outline: Outline) -> None:
    assert [link for link in outline.links if not link.startswith(("#", "data:,"))] == []
    style = re.search(r"<style>(.*?)</style>", page.read_text(), re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_ids_are_unique_and_links_lead_somewhere(outline: Outline) -> None:
    assert len(outline.ids) == len(set(outline.ids))
    missing = {link[1:] for link in outline.links if link.startswith("#") and len(link) > 1} - set(outline.ids)
    assert missing == set()


def test_every_figure_is_on_the_page_and_in_three_formats(page: Path) -> None:
    shown = re.findall(r'data-figure="([^"]+)"', page.read_text())
    assert {
        "tradeoff",
        "ranking",
        "effects",
        "seeds",
        "stability",
        "curves-0",
        "curves-1",
        "curves-2",
        "curves-3",
    } <= set(shown)
    for name in shown:
        for suffix, start in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
            assert (page.parent / "figures" / f"{name}.{suffix}").read_bytes().startswith(start)


def test_errors_samples_configuration_and_rerun_are_there(page: Path, run: Run) -> None:
    text = page.read_text()
    assert "RuntimeError: &lt;out of memory&gt;" in text
    assert "klab rerun" in text
    assert "objective.placement.beta" in text
    assert all(identity in text for identity in run.cells)
    assert "at the start" in text
    assert "after 60 updates" in text


def test_methods_and_provenance(page: Path) -> None:
    text = page.read_text()
    assert "The score is the held-out reward" in text
    assert "Henderson" in text
    assert "training seeds 0–4" in text
    assert "core-hours" in text
    assert "design: one_at_a_time" in text


def test_formulas_of_the_baseline_and_of_every_configuration_are_there(
    page: Path, outline: Outline, study: Study
) -> None:
    text = page.read_text()
    assert outline.tags.count("mfrac") >= 2 * (len(study.configurations) + 1)
    assert text.count(r"\begin{align}") == len(study.configurations) + 1
    assert "Nearest named algorithm: GRPO (DeepSeekMath)" in text
    assert "The baseline is GRPO (DeepSeekMath) (Shao et al. 2024)" in text
    assert "importance ratio" in text


def _render(run: Run, tmp_path: Path) -> str:
    text = render(run.path, tmp_path / "out", figures=False).read_text()
    Outline(text)
    return text


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("diverged", "No run has a score: none of 4 finished."),
        ("failed", "No run has a score: none of 4 finished."),
        ("missing", "No run has a score: none of 4 finished."),
        ("interrupted", "No run has a score: none of 4 finished."),
    ],
)
def test_a_run_without_a_single_finished_seed_gives_a_page_that_says_so(
    small: Small, tmp_path: Path, outcome: str, expected: str
) -> None:
    assert expected in _render(small(seeds=2, outcome=lambda cell: outcome), tmp_path)


def test_a_single_seed_and_constant_rewards(small: Small, tmp_path: Path) -> None:
    assert "One seed per cell" in _render(small("one", seeds=1), tmp_path)
    assert "All cells are within ±0.05 of the baseline" in _render(small("flat", constant=True), tmp_path)


def test_two_tasks_have_a_section_each_and_one_together(small: Small, tmp_path: Path) -> None:
    runs = [small("two", seeds=2).path, small("three", digits=3, seeds=2).path]
    text = render(runs, tmp_path / "out", figures=False).read_text()
    outline = Outline(text)
    assert {"Cells · addition(digits=2)", "Cells · addition(digits=3)", "Across tasks"} <= set(outline.headings)
    assert len(outline.ids) == len(set(outline.ids))


def test_hostile_names_are_shown_as_they_are(tmp_path: Path) -> None:
    text = f"""
name: hostile
description: '{HOSTILE.replace("'", "''")}'
task: {{name: "my.tasks:Task", note: '{HOSTILE.replace("'", "''")}'}}
training: {{updates: 3}}
objective: {{estimator: k1, beta: 0.05}}
axes: {{weight: [{{name: "my.weights:soft", tau: '<b onclick="x">&'}}, {{name: "my.weights:soft", tau: 2}}]}}
seeds: 2
"""

    def outcome(cell: Cell) -> str:
        return "finished"

    run = write_run(tmp_path / "hostile", text, outcome=outcome, completion=lambda cell: HOSTILE)
    page = _render(run, tmp_path)
    assert "<b onclick" not in page
    assert "<script>alert" not in page
    assert "&lt;b onclick=" in page


def test_the_same_run_gives_the_same_page(small: Small, tmp_path: Path) -> None:
    run = small(seeds=2)
    first = render(run.path, tmp_path / "a", figures=False).read_bytes()
    assert render(run.path, tmp_path / "b", figures=False).read_bytes() == first


def test_the_exact_lab_adds_a_figure_and_a_table_beside_reward_and_kl(small: Small, tmp_path: Path) -> None:
    run = small(seeds=2)
    groups = sorted({run.resolved(identity)["group"] for identity in run.cells})
    run.report.mkdir(exist_ok=True)
    rows = [
        {"group": group, "drift": drift, "bias": bias + i, "cosine": 0.9, "variance": i + 1.5, "ess": 0.75, "mse": None}
        for i, group in enumerate(groups)
        for drift, bias in (("4 updates", 0.125), ("on-policy", 0.0625), ("random 0.3", 9.0), ("16 updates", 0.375))
    ]
    (run.report / "gradients.json").write_text(json.dumps({"schema": 1, "rows": rows}))
    text = _render(run, tmp_path)
    assert 'data-figure="plane"' in text
    assert 'id="gradients-task"' in text
    (written,) = tmp_path.rglob("gradients.csv")
    table = pd.read_csv(written)
    assert set(table["group"]) == set(groups)
    mine = table[table["group"] == groups[1]].set_index("drift")
    assert list(mine.index) == ["on-policy", "16 updates"]
    assert (mine.loc["on-policy", "bias"], mine.loc["16 updates", "bias"]) == (1.0625, 1.375)
    assert mine.loc["on-policy", "variance"] == 2.5
    assert mine["final"].notna().all()
    assert mine["reverse_kl_final"].notna().all()


def test_rows_of_the_exact_lab_that_are_not_its_own_are_left_out(small: Small, tmp_path: Path) -> None:
    run = small(seeds=2)
    run.report.mkdir(exist_ok=True)
    (run.report / "gradients.json").write_text('{"schema": 1, "rows": [{"group": "x", "bias": 1}]}')
    assert 'id="gradients-task"' not in _render(run, tmp_path)


def test_rewards_that_a_time_limit_decided_are_told(small: Small, tmp_path: Path) -> None:
    run = small()
    folder = run.cell(run.cells[0])
    result = {key: value for key, value in (folder.result() or {}).items() if key not in ("rows", "checksum")}
    (folder.path / "result.json").unlink()
    folder.write_result({**result, "reward_timeouts": 3})
    study = load_run(run.path)
    assert study.cells.set_index("cell")["reward_timeouts"].to_dict()[run.cells[0]] == 3
    text = render(run.path, tmp_path / "report", figures=False).read_text()
    assert "3 rewards of 1 run counted as wrong because a time limit was reached (reward_timeouts)" in text


def test_cells_without_a_gradient_are_told_and_not_called_best_without_a_word(small: Small, tmp_path: Path) -> None:
    run = small()
    before = load_run(run.path)
    best = compare(before, before.tasks[0]).table["group"].iloc[0]
    stored = [run.cell(identity) for identity in run.cells if run.resolved(identity)["group"] == best]
    for folder in stored:
        result = {key: value for key, value in (folder.result() or {}).items() if key not in ("rows", "checksum")}
        (folder.path / "result.json").unlink()
        folder.write_result({**result, "zero_gradient": True})
    study = load_run(run.path)
    found = find(study, compare(study, study.tasks[0]))
    assert found.headline.endswith(
        "But the policy gradient of the best mean was 0 in every update: it has learnt nothing from its rewards."
    )
    assert found.cautions[0] == (
        f"The policy gradient was 0 in every update of {len(stored)} runs (zero_gradient), which learnt nothing from "
        f"the rewards: {study.labels[best]}."
    )
    assert (
        f"0 in every update of {len(stored)} runs" in render(run.path, tmp_path / "report", figures=False).read_text()
    )


def test_a_report_is_not_written_through_links(small: Small, tmp_path: Path) -> None:
    run = small(seeds=1)
    victim, out = tmp_path / "victim", tmp_path / "out"
    (victim / "tables").mkdir(parents=True)
    (out / "figures").mkdir(parents=True)
    (victim / "notes").write_text("mine")
    (out / "tables").symlink_to(victim / "tables")
    for name in ("index.html", "figures/ranking.svg"):
        (out / name).symlink_to(victim / "notes")
    render(run.path, out)
    assert (victim / "notes").read_text() == "mine"
    assert not list((victim / "tables").iterdir())
    assert (out / "tables" / "cells.csv").is_file()
