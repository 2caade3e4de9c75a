"""lm-evaluation-harness at the end of a cell: on tasks of files, without a network, resumed, and when it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from klab.grid import UserError, load_grid
from klab.grid.schema.sections import load_section
from klab.harness.cli.main import main
from klab.harness.preflight.checks import check_evaluations
from klab.harness.store import CellFolder, Run, files
from klab.harness.training import run_cells
from klab.harness.training.final_evaluation import RECORD, evaluate_policy
from tests.support.small_cells import small_policy

TRAINING = {
    "updates": 2,
    "prompts": 2,
    "group_size": 2,
    "lr": 0.01,
    "evaluate_every": 2,
    "evaluation_prompts": 2,
    "evaluation_samples": 1,
    "final_evaluation_samples": 1,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks of lm-evaluation-harness: sums with choices, and sums to write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"question": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
        "metadata": {"version": 3.0},
    }
    chosen = {
        **common,
        "task": "sums_chosen",
        "output_type": "multiple_choice",
        "doc_to_choice": ["1", "3", "5", "7"],
        "doc_to_target": "{{['1', '3', '5', '7'].index(answer)}}",
        "metric_list": [{"metric": "acc"}],
    }
    written = {
        **common,
        "task": "sums_written",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "chosen.yaml").write_text(yaml.safe_dump(chosen))
    (tmp_path / "written.yaml").write_text(yaml.safe_dump(written))
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump({**written, "task": "broken", "test_split": "none"}))
    small_policy(tmp_path / "start", "0123456789+=")
    return tmp_path


def grid_file(place: Path, evaluate: Any, seeds: int = 1) -> Path:
    grid = {
        "name": "sums",
        "task": {"name": "addition", "digits": 1},
        "policy": {"name": "hf", "model": str(place / "start")},
        "training": TRAINING,
        "seeds": seeds,
        **({} if evaluate is None else {"evaluate": evaluate}),
    }
    file = place / "sums.yaml"
    file.write_text(json.dumps(grid))
    return file


def record(folder: CellFolder) -> dict[str, Any]:
    found = json.loads((folder.path / RECORD).read_text())
    assert isinstance(found, dict)
    return found


def test_a_cell_ends_with_its_evaluations_beside_the_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = grid_file(place, {"lm_eval": ["chosen.yaml", "written.yaml", "broken.yaml"]})
    plain = load_grid(grid_file(place, None)).cells[0].id
    grid = load_grid(grid_file(place, {"lm_eval": ["chosen.yaml", "written.yaml", "broken.yaml"]}))
    assert grid.cells[0].id == plain, "evaluations are no part of a cell"
    run = Run.create(place / "runs/sums", grid)
    assert run_cells(run.path, run.cells) == {plain: "finished"}
    folder = run.cell(plain)
    result, kept = folder.result(), record(folder)
    assert result is not None
    assert set(result["lm_eval"]) == {"sums_chosen.acc", "sums_written.exact_match"}
    assert all(0.0 <= value <= 1.0 for value in result["lm_eval"].values())
    assert list(result["lm_eval_failed"]) == [str(place / "broken.yaml")]
    assert kept["versions"] == {"lm_eval": version("lm_eval")}
    first, second = (kept["tasks"][str(place / f"{name}.yaml")] for name in ("chosen", "written"))
    assert (first["documents"], first["versions"]) == ({"sums_chosen": 4}, {"sums_chosen": 3.0})
    assert second["metrics"] == {"sums_written.exact_match": result["lm_eval"]["sums_written.exact_match"]}
    assert file.exists()

    def asked(*words: str) -> str:
        assert main(["report", "sums", "--no-gradients", "--no-figures", *words]) == 0
        return capsys.readouterr().out

    assert "lm_eval.sums_chosen.acc" in asked("--format", "csv")
    assert "sums_chosen" in asked("--format", "md", "--score", "lm_eval.sums_chosen")

    settings = load_section("evaluate", {"lm_eval": [str(place / "chosen.yaml"), str(place / "written.yaml")]})
    mark = {**first, "metrics": {"sums_chosen.acc": 0.125}}
    (folder.path / RECORD).write_bytes(files.encode_record({**kept, "tasks": {str(place / "chosen.yaml"): mark}}))
    again = evaluate_policy(folder, settings, "cpu")  # type: ignore[arg-type]
    assert again == {"lm_eval": {"sums_chosen.acc": 0.125, **second["metrics"]}}, "only what was missing"
    (folder.policy / "config.json").write_text((folder.policy / "config.json").read_text() + "\n")
    assert evaluate_policy(folder, settings, "cpu", stop=lambda: True) is None  # type: ignore[arg-type]
    assert record(folder)["tasks"] == {}, "another policy has no evaluations yet"


def test_mistakes_are_found_before_anything_trains(place: Path) -> None:
    section = {"lm_eval": ["gsm9k", str(place / "chosen.yaml")]}
    found = list(check_evaluations(section, place / "sums.yaml"))
    assert [each.is_mistake for each in found] == [True]
    assert "evaluate.lm_eval: unknown task (got 'gsm9k'); did you mean 'gsm8k'?" in found[0].text
    assert list(check_evaluations({"lm_eval": ["gsm8k"]}, place / "sums.yaml")) == []


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"lm_eval": ["nowhere.yaml"]}, r"evaluate\.lm_eval: no such file \(got 'nowhere.yaml'\)"),
        ({"lm_eval": []}, r"evaluate\.lm_eval: not a task"),
        ({"lm_eval": ["gsm8k", "gsm8k"]}, "stands twice"),
        ({"lm_eval": "gsm8k", "limt": 3}, r"did you mean 'limit'"),
        ({"lm_eval": "gsm8k", "limit": 0}, r"evaluate\.limit"),
    ],
)
def test_the_section_is_checked(place: Path, evaluate: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_grid(grid_file(place, evaluate))


def test_an_evaluation_without_the_package_does_not_lose_the_cell(
    place: Path, monkeypatch: pytest.MonkeyPatch, make_folder: Callable[[], CellFolder]
) -> None:
    from klab.harness.training import final_evaluation
    from klab.tasks.packages import require_package

    def require(evaluations: object) -> None:
        require_package("lm_evaluation", "lm_eval", "evaluate.lm_eval", "gsm8k")

    monkeypatch.setattr(final_evaluation, "require_lm_eval", require)
    found = evaluate_policy(make_folder(), load_section("evaluate", {"lm_eval": "gsm8k"}), "cpu")  # type: ignore[arg-type]
    assert found is not None
    assert found["lm_eval"] == {}
    assert "pip install 'klab[lm_eval]'" in found["lm_eval_failed"]["gsm8k"]


@pytest.fixture
def make_folder(place: Path) -> Callable[[], CellFolder]:
    """The folder of a cell whose policy is there."""

    def make() -> CellFolder:
        run = Run.create(place / "runs/sums", load_grid(grid_file(place, None)))
        folder = run.cell(run.cells[0])
        folder.policy.mkdir(parents=True)
        return folder

    return make
