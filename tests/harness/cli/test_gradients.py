"""`klab gradients`: a study, an algorithm, a run, the table of KL errors, the product of the axes."""

from __future__ import annotations

import csv
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from klab.grid import load_grid
from klab.harness.cli.gradients import measure_run
from klab.harness.cli.main import main
from klab.harness.exact import product_sweep as sweep
from klab.harness.store import Run

GRID = """
name: small
task: {name: addition}
training: {updates: 2, group_size: 3, updates_per_rollout: 2}
objective: {advantage: raw, placement: none}
axes:
  ratio: [token, sequence_product]
  weight: [one, ratio]
seeds: 2
"""
QUICK = ["--samples", "200", "--drift", "0.3", "--updates", "2"]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(GRID)
    return file


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["gradients", *words, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    return found


def test_every_configuration_of_a_grid_once_in_every_setting(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, str(study), *QUICK)
    groups = load_grid(study).groups
    assert len(groups) == 3  # both ratios are one algorithm under weight one
    drifts = ("on-policy", "random 0.3", "2 updates")
    assert [(row["group"], row["drift"]) for row in found] == [(group, drift) for group in groups for drift in drifts]
    product = [row for row in found if "sequence_product" in row["group"]]
    assert all(row["bias"] < 1e-12 for row in product)
    assert all(row["bias"] > 0.01 for row in found if row["drift"] != "on-policy" and row not in product)


def test_an_algorithm_by_name_as_a_table_and_as_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "grpo.csv"
    assert main(["gradients", "grpo", *QUICK, "--csv", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "on-policy" in shown
    assert "cosine" in shown
    with file.open() as stream:
        written = list(csv.DictReader(stream))
    assert [row["drift"] for row in written] == ["on-policy", "random 0.3", "2 updates"]
    assert {row["group"] for row in written} == {"grpo"}


def test_a_cell_whose_reference_is_the_policy_that_drew_the_rollout_is_measured_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is held to a policy that is one's own: on-policy the truth is that of the reward, and k2 adds nothing."""
    file = tmp_path / "rollout.yaml"
    text = GRID[: GRID.index("objective:")] + "objective: {advantage: raw, estimator: k2, beta: 0.5}\n"
    file.write_text(text + "axes: {training.reference: [fixed, rollout]}\nseeds: 1\n")
    found = rows(capsys, str(file), *QUICK)
    fixed, drawn = load_grid(file).groups
    bias = {(row["group"], row["drift"]): row["bias"] for row in found}
    assert bias[fixed, "on-policy"] > 0.01
    assert bias[drawn, "on-policy"] < 1e-12
    assert bias[drawn, "random 0.3"] > 0.01


def test_a_run_keeps_its_rows_for_the_report_that_of_its_schedule_first(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.create(tmp_path / "runs" / "small", load_grid(study))
    found = rows(capsys, str(run.path), *QUICK)
    kept = json.loads((run.report / "gradients.json").read_text())
    assert sorted(map(str, kept["rows"])) == sorted(map(str, found))
    first: dict[str, str] = {}
    for row in kept["rows"]:
        first.setdefault(row["group"], row["drift"])
    assert first == dict.fromkeys(load_grid(study).groups, "2 updates")
    assert {"bias", "cosine", "variance"} <= set(kept["rows"][0])


def test_a_run_with_metrics_is_measured_at_the_drift_that_they_show(study: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "runs" / "small", load_grid(study))
    grid = load_grid(study)
    for cell in grid.cells:
        folder = run.cell(cell.id)
        folder.append_metrics({"update": k + 1, "kl_behaviour": 0.02 * k * (1 + cell.seed)} for k in range(2))
    measure_run(run, most=10)
    kept = json.loads((run.report / "gradients.json").read_text())["rows"]
    trained = {row["group"]: row["kl"] for row in kept if row["drift"] == "as trained"}
    # The mean over updates and both seeds is 0.015 per token; the lab's trajectories have three.
    assert trained == pytest.approx(dict.fromkeys(grid.groups, 0.045), rel=1e-6)
    first: dict[str, str] = {}
    for row in kept:
        first.setdefault(row["group"], row["drift"])
    assert first == dict.fromkeys(grid.groups, "as trained")


def test_the_report_measures_a_run_once_and_leaves_large_runs_alone(study: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "runs" / "small", load_grid(study))
    kept = run.report / "gradients.json"
    measure_run(run, most=0)
    assert not kept.exists()
    measure_run(run, most=10)
    assert {row["group"] for row in json.loads(kept.read_text())["rows"]} == set(load_grid(study).groups)
    kept.write_text("{}")
    measure_run(run, most=10)
    assert kept.read_text() == "{}"


def test_the_kl_table_names_the_exact_entries(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "--kl-table", "--horizon", "2")
    errors = {(row["estimator"], row["placement"], row["ratio"], row["drift"]): row["error"] for row in found}
    assert errors["k1", "reward", "none", 0.0] < 1e-12 < errors["k1", "reward", "token", 0.3]
    assert errors["k1", "reward", "sequence_product", 0.3] < 1e-12
    assert errors["k1", "loss", "none", 0.0] == pytest.approx(1.0)
    assert main(["gradients", "--kl-table", "--horizon", "2"]) == 0
    assert "after random drift of 0.3" in capsys.readouterr().out


def test_the_kl_table_measures_each_divergence_against_its_own_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--kl-table", "--horizon", "2", "--divergence", "forward", "--divergence", "jeffreys")
    found = rows(capsys, *asked)
    errors = {
        (row["divergence"], row["estimator"], row["placement"], row["ratio"], row["drift"]): row["error"]
        for row in found
    }
    for divergence in ("forward", "jeffreys"):
        assert errors[divergence, "k3", "reward_and_loss", "none", 0.0] < 1e-12
        assert errors[divergence, "k3", "loss_corrected", "prefix_product", 0.3] < 1e-12
        assert errors[divergence, "k1", "reward", "none", 0.0] > 1.0
    assert main(["gradients", "--divergence", "forwrad", "--kl-table"]) == 2
    assert "did you mean 'forward'" in capsys.readouterr().err


def test_the_product_goes_into_a_file_that_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product itself, cut down to its first combinations."""
    few = list(islice(sweep.main_axes_product(), 5))
    monkeypatch.setattr(sweep, "main_axes_product", lambda aggregation: few)
    file = tmp_path / "product.jsonl"
    first = rows(capsys, "--product", str(file), "--samples", "200")
    written = file.read_bytes()
    assert rows(capsys, "--product", str(file), "--samples", "200") == first
    assert file.read_bytes() == written
    assert len(first) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gradients"], "name a grid file"),
        (["gradients", "grop"], "grpo"),
        (["gradients", "grpo", "--horizon", "30"], "too many to enumerate"),
    ],
)
def test_mistakes_name_what_is_possible(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
