"""A cell is a pure function of its configuration: repeated, resumed, packed or alone, its bits are the same."""

from __future__ import annotations

from typing import Any

import pytest

from klab.harness.training import run_cells
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished, numbers

pytestmark = pytest.mark.bits

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several updates per rollout": {"updates_per_rollout": 2, "minibatches": 2},
    "lag 2": {"lag": 2},
    "lag 3 within rollouts of 2": {"updates_per_rollout": 2, "lag": 3},
    "samples of the reference": {"behaviour": "reference", "updates_per_rollout": 2},
    "schedule": {"schedule": "cosine", "warmup_updates": 2, "weight_decay": 0.1, "temperature": 0.7, "top_p": 0.9},
    "micro-batches": {"micro_batch": 8, "minibatches": 2},
}
OBJECTIVES: list[dict[str, Any]] = [
    {"estimator": "k3", "placement": "loss", "weight": "ppo_clip"},
    {"estimator": "k1", "placement": "reward_to_go", "weight": "truncate", "aggregation": "token_mean"},
    {"placement": "none", "weight": "letters_task:gentle", "training.lr": 0.003, "training.clip_norm": 0.1},
    {"estimator": "full", "placement": "loss"},
    {"estimator": "full", "divergence": "forward", "placement": "loss_corrected"},
    {"estimator": "reinforce", "divergence": "alpha", "alpha": 2, "placement": "advantage"},
    {"estimator": "k2", "placement": "advantage", "advantage": "greedy_baseline"},
]


def test_repeated(make_run: MakeRun) -> None:
    first = finished(make_run("first", {"updates_per_rollout": 2}))
    second = finished(make_run("second", {"updates_per_rollout": 2}))
    assert_same(first, second, first.cells[0])


def test_another_seed_gives_other_numbers(make_run: MakeRun) -> None:
    run = finished(make_run(seeds=2))
    one, two = (numbers(run, identity)["metrics"] for identity in run.cells)
    assert one[0]["reward_mean"] != two[0]["reward_mean"]
    assert one[-1]["k3"] != two[-1]["k3"]


@pytest.mark.parametrize("training", VARIANTS.values(), ids=VARIANTS.keys())
def test_interrupted_after_every_single_update(make_run: MakeRun, training: dict[str, Any]) -> None:
    through = finished(make_run("through", training))
    broken = make_run("broken", training)
    identity = broken.cells[0]
    for update in range(1, 6):
        assert run_cells(broken.path, [identity], stop=StopAfter(1)) == {identity: "interrupted"}
        assert [row["update"] for row in broken.cell(identity).metrics()] == list(range(1, update + 1))
    assert run_cells(broken.path, [identity]) == {identity: "finished"}
    assert_same(through, broken, identity)


@pytest.mark.parametrize(
    ("schedule", "repeated"),
    [
        ({"checkpoint_updates": 3}, [3, 4, 5, 6]),
        ({"checkpoint_updates": 1}, [4, 5, 6]),
        ({"checkpoint_updates": 99}, [0, 1, 2, 3, 4, 5, 6]),
    ],
    ids=["every three updates", "every update", "never"],
)
def test_a_process_that_dies_without_a_word_repeats_the_lost_updates(
    make_run: MakeRun, schedule: dict[str, Any], repeated: list[int]
) -> None:
    training = {**schedule, "lag": 1, "updates_per_rollout": 2}
    through, broken = finished(make_run("through", training)), make_run("broken", training)
    identity = broken.cells[0]

    class Death(BaseException):
        pass

    def die(progress: Any) -> None:
        if progress.update == 5:
            raise Death

    with pytest.raises(Death):
        run_cells(broken.path, [identity], progress=die)
    assert len(broken.cell(identity).metrics()) == 5
    again: list[int] = []
    run_cells(broken.path, [identity], progress=lambda progress: again.append(progress.update))
    assert again == repeated
    assert_same(through, broken, identity)


@pytest.mark.parametrize("training", [{}, {"updates_per_rollout": 2, "lag": 1}], ids=["on policy", "off policy"])
def test_packed_is_alone(make_run: MakeRun, training: dict[str, Any]) -> None:
    packed = finished(make_run("packed", training, OBJECTIVES, seeds=2))
    alone = make_run("alone", training, OBJECTIVES, seeds=2)
    for identity in alone.cells:
        run_cells(alone.path, [identity])
        assert_same(packed, alone, identity)


def test_a_pack_of_unequal_progress_goes_on_as_two(make_run: MakeRun) -> None:
    through, uneven = finished(make_run("through", seeds=3)), make_run("uneven", seeds=3)
    run_cells(uneven.path, uneven.cells[:1], stop=StopAfter(4))
    run_cells(uneven.path, uneven.cells[:2], stop=StopAfter(1))
    assert set(run_cells(uneven.path, uneven.cells).values()) == {"finished"}
    for identity in uneven.cells:
        assert_same(through, uneven, identity)


def test_a_finished_cell_is_left_alone(make_run: MakeRun) -> None:
    run = finished(make_run())
    before = (run.cell(run.cells[0]).path / "result.json").stat().st_mtime_ns
    assert run_cells(run.path, run.cells) == {run.cells[0]: "finished"}
    assert (run.cell(run.cells[0]).path / "result.json").stat().st_mtime_ns == before


def test_evaluating_more_often_changes_no_update(make_run: MakeRun) -> None:
    often, seldom = finished(make_run("often", {"evaluate_every": 1})), finished(make_run("seldom"))
    left, right = numbers(often, often.cells[0]), numbers(seldom, seldom.cells[0])
    assert left["metrics"] == right["metrics"]
    assert [row["update"] for row in left["evaluations"]] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["update"] for row in right["evaluations"]] == [0, 3, 6]
    assert left["evaluations"][::3] == right["evaluations"]
