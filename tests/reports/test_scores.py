"""Scores: exact numbers from evaluations written by hand, what is missing, and what a reader is warned of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from klab.grid import Cell, UserError, parse_grid
from klab.grid.score import parse_score
from klab.harness.store import Run
from klab.harness.training.summary import summarize
from klab.reports import Study, load_run, render
from klab.reports.comparison import compare
from klab.reports.findings import find, noise_words
from klab.reports.scores import run_scores, sampling_deviations, score_notes
from tests.reports.synthetic import write_run

TEXT = """
name: scores
task: {{name: addition, digits: 2}}
training: {{updates: 20, evaluate_every: 5}}
objective: {{algorithm: grpo, beta: 0.5}}
design: list
cells: {cells}
seeds: {seeds}
"""

Row = Mapping[str, Any]


def _row(update: int, reward: float, kl: float, completions: int = 100, **more: Any) -> Row:
    return {
        "update": update,
        "accuracy": reward / 2,
        "reward": reward,
        "reward_se": 0.1,
        "completions": completions,
        "pass_at_k": min(reward * 2, 1.0),
        "k": 4,
        "reverse_kl": kl,
        "forward_kl": kl,
        "entropy": 1.0,
        "length": 4.0,
        "parts": {"format": reward / 4},
        **more,
    }


PATH = [_row(0, 0.1, 0.0), _row(5, 0.3, 0.2), _row(10, 0.2, 0.6), _row(18, 0.4, 0.5, 100), _row(20, 0.5, 0.8, 300)]


def _study(path: Path, cells: str, evaluations: Mapping[int, Sequence[Row]], states: Mapping[int, str] = {}) -> Study:
    """A run whose n-th cell has the n-th evaluations; cells without any are left alone."""
    grid = parse_grid(TEXT.format(cells=cells, seeds=1), path / "grid.yaml")
    run = Run.create(path, grid)
    for number, cell in enumerate(grid.cells):
        folder = run.cell(cell.id)
        if number not in evaluations:
            continue
        rows = evaluations[number]
        folder.append_evaluations(rows)
        result = summarize(20, [], rows)
        folder.write_result({**result, "state": states.get(number, "finished"), "reward_final": 0.9})
    return load_run(path)


def _score(study: Study, name: str) -> list[float]:
    return run_scores(study, parse_score(name)).tolist()


def test_scores_of_one_path(tmp_path: Path) -> None:
    study = _study(tmp_path / "run", "[{}]", {0: PATH})
    # The evaluations after 18 and 20 of 20 updates count, by their completions.
    expected = {
        "reward": (0.4 * 100 + 0.5 * 300) / 400,
        "accuracy": (0.2 + 0.25) / 2,
        "pass_at_k": (0.8 * 100 + 1.0 * 300) / 400,
        "parts.format": (0.1 * 100 + 0.125 * 300) / 400,
        "objective": 0.475 - 0.5 * (0.5 * 100 + 0.8 * 300) / 400,
        "objective(0.1)": 0.475 - 0.1 * 0.725,
        "reward_at_kl(0)": 0.1,
        "reward_at_kl(0.05)": 0.15,
        "reward_at_kl(0.2)": 0.3,
        "reward_at_kl(0.5)": 0.3 - 0.1 * (0.3 / 0.4),
        "reward_at_kl(0.7)": 0.4 + 0.1 * (0.2 / 0.3),
        "training_reward": 0.9,
        "accuracy_final": 0.25,
        "reverse_kl_final": 0.8,
    }
    assert {name: _score(study, name)[0] for name in expected} == pytest.approx(expected)
    assert np.isnan(_score(study, "reward_at_kl(0.81)")).all()
    deviation = np.hypot(100 * 0.1, 300 * 0.1) / 400
    assert sampling_deviations(study, parse_score("reward")).tolist() == pytest.approx([deviation])
    assert np.isnan(sampling_deviations(study, parse_score("accuracy"))).all()


def test_a_cell_without_a_kl_term_has_its_reward_as_objective(tmp_path: Path) -> None:
    study = _study(tmp_path / "run", "[{}, {placement: none}]", {0: PATH, 1: PATH})
    assert _score(study, "objective") == pytest.approx([0.475 - 0.5 * 0.725, 0.475])
    assert _score(study, "objective(0.5)") == pytest.approx([0.475 - 0.5 * 0.725] * 2)
    (note,) = score_notes(study, parse_score("objective"))
    assert note.startswith("β differs between cells (0, 0.5)")
    assert score_notes(study, parse_score("objective(0.5)")) == ()


def test_what_is_missing_is_no_number_and_is_told(tmp_path: Path) -> None:
    broken = [*PATH[:-1], {**PATH[-1], "reward": None}]
    study = _study(
        tmp_path / "run", "[{}, {estimator: k1}, {estimator: k2}, {estimator: abs}]", {0: PATH, 1: broken, 2: []}
    )
    assert np.isnan(_score(study, "reward")).tolist() == [False, True, True, True]
    (note,) = score_notes(study, parse_score("reward"))
    assert note == "2 of 4 runs finished without a held-out reward: they are missing data."
    low = _study(tmp_path / "low", "[{}, {estimator: k1}]", {0: PATH, 1: PATH[:2]})
    assert score_notes(low, parse_score("reward_at_kl(0.5)")) == (
        "1 of 2 runs finished without ever reaching KL 0.5: they are missing data.",
    )


def test_a_level_that_is_leapt_over_is_told(tmp_path: Path) -> None:
    study = _study(tmp_path / "run", "[{}, {estimator: k1}]", {0: PATH, 1: [PATH[0], _row(20, 0.9, 3.0)]})
    (note,) = score_notes(study, parse_score("reward_at_kl(0.5)"))
    assert note.startswith("1 of 2 runs pass KL 0.5 between two evaluations of which the second is beyond 1:")
    (both,) = score_notes(study, parse_score("reward_at_kl(0.05)"))
    assert both.startswith("2 of 2 runs pass KL 0.05 between")


def test_a_part_that_no_evaluation_has(tmp_path: Path) -> None:
    study = _study(tmp_path / "run", "[{}]", {0: PATH})
    with pytest.raises(UserError, match=r"parts\.format"):
        _score(study, "parts.formt")


def test_a_diverged_run_counts_as_the_worst_finished_one_by_every_score(tmp_path: Path) -> None:
    high = [_row(0, 0.5, 0.0), _row(20, 0.9, 0.3)]
    evaluations = {0: PATH, 1: high, 2: high}
    study = _study(tmp_path / "run", "[{}, {estimator: k1}, {estimator: k2}]", evaluations, {2: "diverged"})
    for name, worst in (("reward", 0.475), ("reverse_kl_final", 0.8), ("reward_at_kl(0.3)", 0.275)):
        comparison = compare(study, study.tasks[0], name)
        assert comparison.worst == pytest.approx(worst)
        assert comparison.scores[2].tolist() == pytest.approx([worst])


@pytest.mark.parametrize(
    ("axis", "values", "word"),
    [
        ("training.temperature", "[1.0, 0.7]", "drawn at this temperature"),
        ("training.lag", "[0, 2]", "older policy"),
        ("training.equal_groups", "[keep, drop]", "left out or replaced"),
        ("training.overlong_buffer", "[null, 2]", "charge for length"),
        ("training.lr", "[1.0e-4, 3.0e-4]", ""),
    ],
)
def test_an_axis_that_changes_what_the_training_reward_means(tmp_path: Path, axis: str, values: str, word: str) -> None:
    text = f"""
name: axis
task: {{name: addition, digits: 2}}
training: {{updates: 10, updates_per_rollout: 2, evaluate_every: 5}}
objective: {{algorithm: grpo, beta: 0.05}}
axes: {{{axis}: {values}}}
seeds: 2
"""
    study = load_run(write_run(tmp_path / "axis", text).path)
    assert score_notes(study, parse_score("reward")) == ()
    notes = score_notes(study, parse_score("training_reward"))
    assert len(notes) == bool(word)
    assert all(word in note and note.startswith(f"{axis} varies") for note in notes)
    flattering = score_notes(study, parse_score("reward_best"))
    assert "maximum of a noisy curve" in flattering[-1]


def test_the_warning_is_on_the_page_only_where_it_belongs(tmp_path: Path) -> None:
    text = """
name: hot
task: {name: addition, digits: 2}
training: {updates: 10, evaluate_every: 5}
axes: {training.temperature: [1.0, 0.7]}
seeds: 3
"""
    run = write_run(tmp_path / "hot", text)
    warning = "training.temperature varies and changes what the training reward measures"
    study = load_run(run.path)
    told = {name: find(study, compare(study, study.tasks[0], name)).cautions for name in ("reward", "reward_final")}
    assert {name: any(warning in text for text in texts) for name, texts in told.items()} == {
        "reward": False,
        "reward_final": True,
    }
    page = render(run.path, tmp_path / "out", scores=["reward", "reward_final"], figures=False).read_text()
    assert page.count(warning) == 1
    assert "Compared by held-out reward" in page
    assert "By training reward" in page


def test_the_noise_of_sampling_stands_beside_that_of_seeds(tmp_path: Path) -> None:
    def noisy(cell: Cell) -> str:
        return "finished"

    study = load_run(write_run(tmp_path / "run", outcome=noisy, only=lambda cell: cell.seed < 3).path)
    comparison = compare(study, study.tasks[0])
    by_group = study.cells.assign(score=run_scores(study, comparison.score))
    finished = by_group[by_group["state"] == "finished"].groupby("group")["score"]
    assert comparison.seed_deviation == pytest.approx(np.sqrt(finished.var(ddof=1).mean()))
    assert np.isnan(comparison.sampling_deviation)
    told = _study(tmp_path / "told", "[{}]", {0: PATH})
    assert compare(told, told.tasks[0]).sampling_deviation == pytest.approx(np.hypot(10, 30) / 400)
    assert noise_words(comparison).endswith(f"of {comparison.seed_deviation:.3f} between the seeds of a cell.")
    coarse, fine = (noise_words(replace(comparison, seed_deviation=0.1, sampling_deviation=s)) for s in (0.06, 0.02))
    assert "alone gives 0.060. More completions (training.final_evaluation_samples)" in coarse
    assert fine.endswith("alone gives 0.020.")


def test_cells_that_were_examined_on_other_prompts(tmp_path: Path) -> None:
    cells = "[{}, {training.evaluation_prompts: 32}]"
    study = _study(tmp_path / "run", cells, {0: PATH, 1: PATH})
    assert score_notes(study, parse_score("training_reward")) == ()
    (note,) = score_notes(study, parse_score("accuracy"))
    assert "different numbers of prompts (32, 64)" in note
