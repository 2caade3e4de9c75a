"""The report says which versions of which libraries cells were trained with, and where these differ."""

from __future__ import annotations

from pathlib import Path

from klab.harness.store import Run
from klab.reports import load_run
from klab.reports.comparison import compare_all
from klab.reports.methods import methods
from klab.reports.software import are_alike, encoded, software
from tests.reports.synthetic import write_run

GRID = """
name: engines
task: {name: addition, digits: 2}
policy: {name: tiny, lora: {rank: 4}}
training: {updates: 20, evaluate_every: 10}
objective: {algorithm: grpo, beta: 0.05}
axes:
  training.engine: [klab, trl]
seeds: 3
"""


def first_paragraph(path: Path) -> str:
    study = load_run(path)
    return methods(study, compare_all(study))[0]


def with_versions(run: Run, trl: list[str]) -> None:
    """Let the cells on TRL have been trained with these versions of it."""
    cells = [identity for identity in run.cells if run.cell(identity).cell().training.engine == "trl"]
    for identity, version in zip(cells, trl, strict=True):
        folder = run.cell(identity)
        folder.write_result({**(folder.result() or {}), "versions": {"torch": "2.13.0", "trl": version}})


def test_the_methods_name_the_engine_and_the_libraries_of_its_cells(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", GRID)
    with_versions(run, ["1.16.0"] * 3)
    text = first_paragraph(run.path)
    assert "Configurations with the engine trl were trained by TRL's GRPOTrainer with klab's objective" in text
    klab, peft = run.manifest["versions"]["klab"], run.manifest["versions"]["peft"]
    assert f"Runs used klab {klab}, PyTorch 2.13.0, Transformers " in text
    assert f", TRL 1.16.0, Accelerate {run.manifest['versions']['accelerate']} and PEFT {peft}." in text
    assert not [note for note in load_run(run.path).notes if "versions" in note]


def test_the_engine_is_an_axis_with_an_effect_and_an_interval(tmp_path: Path) -> None:
    study = load_run(write_run(tmp_path / "run", GRID, noise=0.0).path)
    assert [(axis.title, axis.values) for axis in study.axes] == [("engine", ("klab", "trl"))]
    row = study.summary().set_index("label").loc["engine trl"]
    assert row["pairs"] == 3
    assert row["difference_low"] < row["difference"] < row["difference_high"]


def test_cells_that_were_trained_with_different_versions_are_noted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", GRID)
    with_versions(run, ["1.16.0", "1.16.1", "1.16.0"])
    note = "Cells were trained with different versions of trl (1.16.0: 2 cells, 1.16.1: 1 cells)."
    assert note in load_run(run.path).notes
    assert note in load_run(run.path).notes  # from the cache
    assert "TRL 1.16.0 and 1.16.1" in first_paragraph(run.path)


def test_without_a_result_the_versions_are_those_of_the_launch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", GRID.replace("[klab, trl]", "[trl]"), outcome=lambda cell: "stopped")
    text = first_paragraph(run.path)
    assert f"TRL {run.manifest['versions']['trl']}" in text
    assert "They were trained by TRL's GRPOTrainer" in text


def test_runs_are_compared_by_the_libraries_that_both_used() -> None:
    plain, on_trl = {"versions": {"torch": "2.13.0"}}, {"versions": {"torch": "2.13.0", "trl": "1.16.0"}}
    assert are_alike([plain, on_trl])
    assert not are_alike([plain, on_trl, {"versions": {"trl": "1.16.1"}}])


def test_a_strangers_record_is_data() -> None:
    odd = {"versions": {"torch": "x" * 1000, 3: None, "trl": {"a": 1}}}
    assert software([encoded(odd), encoded({"versions": [1]}), encoded(None), ""]) == {
        "torch": {"x" * 40: 1},
        "trl": {"{'a': 1}": 1},
    }
