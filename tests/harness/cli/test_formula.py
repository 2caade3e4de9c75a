"""`klab formula` prints algorithms, cells and grids, for a terminal and for a paper."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Grid
from klab.grid.formula import ascii_only
from klab.harness.store import Run

MakeGrid = Callable[..., Grid]
Ask = Callable[..., Any]
README = Path(__file__).parents[3] / "grid/README.md"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal as wide as one is taken to be that does not say."""
    monkeypatch.setenv("COLUMNS", "120")


def test_an_algorithm_for_a_terminal(ask: Ask) -> None:
    text = ask("formula", "grpo")
    assert text.splitlines()[0] == "GRPO (DeepSeekMath), Shao et al. 2024"
    assert "L     = −(1/N) Σ_{n=1}^N (1/H_n) Σ_{j=1}^{H_n} (sg[w_j·A_j]·ℓ_j − β·φ_j)" in text
    assert re.search(r"β = 0.04 +coefficient β of the KL term", text)
    assert "This is GRPO (DeepSeekMath) (grpo; Shao et al. 2024)." in text


def test_the_readmes_example_is_what_the_command_prints(ask: Ask) -> None:
    shown = re.search(r"\$ klab formula (\S+)\n(.*?)```", README.read_text(), re.DOTALL)
    assert shown
    printed = [line.strip() for line in ask("formula", shown[1]).splitlines()]
    lines = [line.strip() for line in shown[2].splitlines() if line.strip() not in ("", "…")]
    assert len(lines) > 5
    assert all(line in printed for line in lines)


def test_latex_is_an_align_environment_and_comments(ask: Ask) -> None:
    lines = ask("formula", "cispo", "--latex").splitlines()
    outside = [line for line in lines if not line.startswith("%")]
    assert outside[0] == r"\begin{align}"
    assert outside[-1] == r"\end{align}"
    assert all(line.startswith("  ") for line in outside[1:-1])
    assert "% C = 5: largest weight" in lines


def test_a_cell_of_a_run_under_its_own_schedule(make_grid: MakeGrid, ask: Ask, place: Path) -> None:
    grid = make_grid(updates_per_rollout=2, trust_region={"coefficient": 0.3})
    Run.create(place / "runs/little", grid)
    (found,) = ask("formula", grid.cells[0].id, "--json")
    assert found["title"] == f"cell {grid.cells[0].id}"
    assert {"left": "λ_j", "right": "ℓ_j − ℓ_old,j"} in found["equations"]
    assert {
        "latex": r"\beta_{\mathrm{tr}}",
        "text": "β_tr",
        "meaning": "coefficient of the trust region",
        "value": 0.3,
    } in (found["symbols"])
    assert found["latex"].startswith(r"\begin{align}")


def test_of_a_grid_equal_formulas_are_printed_once(make_grid: MakeGrid, ask: Ask) -> None:
    make_grid(cells=[{"estimator": "k1"}, {"estimator": "k3"}, {"training.lr": 0.02}])
    found = ask("formula", "little.yaml", "--json")
    assert [each["title"] for each in found] == ["estimator=k1", "baseline; training.lr=0.02"]
    text = ask("formula", "little.yaml")
    assert text.count("stop-gradient") == 1


def test_a_terminal_without_the_letters_gets_ascii(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klab.harness.cli.formula._letters", ascii_only)
    text = ask("formula", "grpo")
    assert text.isascii()
    assert "phi_j" in text


def test_an_unknown_name_is_said_with_the_nearest(ask: Ask) -> None:
    assert "did you mean 'grpo'" in ask("formula", "grppo", code=2)
    assert "no.yaml" in ask("formula", "no.yaml", code=2)
