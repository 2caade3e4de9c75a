"""A run that every kind of trouble visited, made once; and its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from klab.grid import Cell
from klab.harness.store import Run
from klab.reports import Study, load_run, render
from tests.reports.synthetic import write_run

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)> "quotes" & {{ 7*7 }} $x^2$ \\textbf{}'

SMALL = """
name: small
task: {{name: addition, digits: {digits}}}
training: {{updates: 10, updates_per_rollout: 2, evaluate_every: 5}}
objective: {{algorithm: grpo, beta: 0.05}}
design: {design}
axes: {{estimator: [k1, k3]}}
seeds: {seeds}
"""


def troubled(cell: Cell) -> str:
    """Two seeds of one cell diverge, one of another fails."""
    if cell.objective.weight == "truncate" and cell.seed in (1, 3):
        return "diverged"
    if cell.objective.estimator == "k1" and cell.objective.placement == "loss" and cell.seed == 2:
        return "failed"
    return "finished"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart", outcome=troubled, completion=lambda cell: HOSTILE)


@pytest.fixture(scope="session")
def study(run: Run) -> Study:
    return load_run(run.path)


@pytest.fixture(scope="session")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(run.path, tmp_path_factory.mktemp("report"), scores=["reward", "accuracy_final"])


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Run]:
    """A run of two cells; keyword arguments of the grid text and of `write_run`."""

    def make(
        name: str = "small", *, digits: int = 2, seeds: object = 3, design: str = "one_at_a_time", **options: object
    ) -> Run:
        text = SMALL.format(digits=digits, seeds=seeds, design=design)
        return write_run(tmp_path / name, text, **options)  # type: ignore[arg-type]

    return make
