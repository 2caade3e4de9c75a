"""A run folder of four cells, without any training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from klab.grid import parse_grid
from klab.harness.store import Run

TEXT = """
name: little
task: {name: addition, digits: 1}
policy: {name: tiny}
training: {updates: 8}
objective: {algorithm: grpo, beta: 0.05}
design: one_at_a_time
axes:
  estimator: [k1, k3]
seeds: 2
"""


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """`make_run(old=new, …)` makes the run after replacing texts in the grid file."""

    def make(*changes: tuple[str, str], path: Path | None = None) -> Run:
        text = TEXT
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        return Run.create(path or tmp_path / "run", parse_grid(text, "little.yaml"))

    return make


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    return make_run()
