"""Named algorithms that are more than their loss bring their training settings along."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from klab.grid import Grid, UserError, load_grid, parse_grid
from klab.grid.algorithms import algorithm_names

STUDIES = Path(__file__).parents[2] / "grid" / "studies"


def grid_of(**data: object) -> Grid:
    base = {"name": "g", "task": "addition", "training": {"updates_per_rollout": 2}}
    return parse_grid(yaml.safe_dump({**base, **data}), "g.yaml")


def test_dapo_samples_dynamically_and_reinforce_rej_drops() -> None:
    grid = grid_of(axes={"algorithm": ["dapo", "reinforce_rej", "raft"]})
    assert [cell.training.equal_groups for cell in grid.cells] == ["refill", "drop", "keep"]
    assert [cell.training.refill_rounds for cell in grid.cells] == [9, 3, 3]
    assert [cell.objective.rejected for cell in grid.cells[1:]] == [-1.0, 0.0]


def test_what_the_file_writes_goes_first() -> None:
    training = {"updates_per_rollout": 2, "equal_groups": "keep"}
    (cell,) = grid_of(objective={"algorithm": "dapo"}, training=training).cells
    assert (cell.training.equal_groups, cell.training.refill_rounds) == ("keep", 3)  # idle, hence as if unwritten


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (
            {"refill_rounds": 5},
            r"training\.refill_rounds: has no effect .* only equal_groups: refill draws again",
        ),
        (
            {"overlong_penalty": 2.0},
            r"training\.overlong_penalty: has no effect .* there is no overlong_buffer",
        ),
    ],
)
def test_settings_of_what_is_not_asked_for_are_mistakes(training: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        grid_of(training=training)
    asked = {"equal_groups": "refill", "overlong_buffer": 2, **training}
    assert len(grid_of(training=asked).cells) == 1


def test_the_study_of_rejection_has_six_algorithms_that_differ() -> None:
    grid = load_grid(STUDIES / "raft.yaml")
    places = Counter((cell.task, cell.training.updates_per_rollout) for cell in grid.cells if cell.seed == 0)
    assert set(places.values()) == {6}
    assert len(places) == 4
    rejecting = {cell.training.equal_groups for cell in grid.cells if cell.algorithm == "reinforce_rej"}
    assert rejecting == {"keep", "drop"}


def test_the_study_of_all_algorithms_has_all() -> None:
    text = yaml.safe_load((STUDIES / "algorithms.yaml").read_text())
    assert text["axes"]["algorithm"] == list(algorithm_names())
