"""The wall time of a pack is divided between its cells by what they gave to do."""

from __future__ import annotations

import time

import pytest

from klab.harness.training.runtime.timer import PHASES, PhaseTimer, shares


def test_phases_are_shared_by_tokens_and_the_step_evenly() -> None:
    timer = PhaseTimer()
    for phase in PHASES:
        with timer(phase):
            time.sleep(0.002)
    long, short = timer.take([300, 100])
    for phase in PHASES:
        assert long[f"seconds_{phase}"] == pytest.approx(short[f"seconds_{phase}"] * (1 if phase == "step" else 3))
        assert long[f"seconds_{phase}"] + short[f"seconds_{phase}"] >= 0.002
    assert set(timer.take([1])[0].values()) == {0.0}


def test_cells_without_any_token_share_evenly() -> None:
    assert shares([0, 0]) == [0.5, 0.5]
    assert shares([1, 3]) == [0.25, 0.75]
