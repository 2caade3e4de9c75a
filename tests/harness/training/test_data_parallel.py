"""Several processes train a cell as one does: the same tokens, the same numbers but for rounding, and bits of their own
that do not depend on what happens to them. The other processes are real ones, which do one test after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from klab.harness.training.distributed.process_group import ProcessGroupLost
from tests.support.training_records import MakeRun, StopAfter, assert_close, assert_same, close, finished, numbers
from tests.support.worker_pool import worker_pool

Together = Callable[..., dict[str, str]]

EXACT: dict[str, Any] = {"policy.dtype": "float64"}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Together]:
    """`run_cells` in two or three processes, of which this one leads."""
    with worker_pool(tmp_path_factory.mktemp("workers"), 3) as pool:
        yield pool


CELLS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "a pack, one of whose members compares whole distributions": (
        {"updates_per_rollout": 2},
        [{"estimator": "full", "placement": "loss"}, {"estimator": "full", "placement": "loss", "beta": 0.2}],
    ),
    "micro-batches of single rows": ({"micro_batch": 1, "prompts": 3, "group_size": 2}, [{}]),
    "an exponent of the whole update": (
        {"updates_per_rollout": 2, "minibatches": 2, "lag": 1},
        [{"weight": "adaptive"}, {"weight": "adaptive", "advantage": "greedy_baseline"}],
    ),
    "an environment": ({"prompts": 5}, [{}]),
    "groups that are drawn again, by another sampler": (
        {"equal_groups": "refill", "group_size": 2, "sampler": {"temperature": 1.5, "correction": "tis"}, "lag": 1},
        [{}, {"advantage": "greedy_baseline"}],
    ),
    "references that move": (
        {"reference": {"ema": 0.5}, "updates_per_rollout": 2, "beta_control": {"schedule": "linear"}},
        [{"beta": 0.3}, {"beta": 0.1}],
    ),
    "entropies of the whole update": (
        {"updates_per_rollout": 2, "entropy_control": {"target": 5.0, "step": 0.1}},
        [{"entropy_bonus": 0.1, "entropy_share": 0.4}, {"weight": "kl_cov", "cov_share": 0.2}],
    ),
    "a critic": ({"critic": {"kind": "model"}, "updates_per_rollout": 2}, [{"advantage": "gae"}]),
    "groups that leave the update": (
        {"equal_groups": "drop", "truncated": "mask", "prompts": 5, "group_size": 2, "overlong_buffer": 2},
        [{"placement": "loss", "aggregation": "token_mean"}, {"advantage": "batch_norm"}],
    ),
}


@pytest.mark.parametrize(
    ("training", "objectives", "size"),
    [(*cell, 2 + number % 2) for number, cell in enumerate(CELLS.values())],
    ids=CELLS.keys(),
)
def test_the_numbers_of_one_process(
    make_run: MakeRun,
    together: Together,
    training: dict[str, Any],
    objectives: list[dict[str, Any]],
    size: int,
    request: pytest.FixtureRequest,
) -> None:
    task = {"name": "letters_task:Echo"} if "environment" in request.node.callspec.id else None
    cells = [{**objective, **EXACT} for objective in objectives]
    training = {"updates": 4, "evaluate_every": 2, "evaluation_prompts": 5, **training}
    single = finished(make_run("single", training, cells, task=task))
    several = make_run("several", training, cells, task=task)
    assert set(together(several, size).values()) == {"finished"}
    assert_close(single, several)


def test_the_same_bits_whenever_as_many_processes_train(make_run: MakeRun, together: Together) -> None:
    """Repeated, and interrupted after every second update, alone and in a pack."""
    training = {"updates_per_rollout": 2, "prompts": 5, "updates": 5}
    through = make_run("through", training, seeds=2)
    assert set(together(through, 2).values()) == {"finished"}
    broken = make_run("broken", training, seeds=2)
    for _ in range(2):
        assert set(together(broken, 2, stop=StopAfter(2)).values()) == {"interrupted"}
    assert set(together(broken, 2, cells=broken.cells[:1]).values()) == {"finished"}
    assert set(together(broken, 2).values()) == {"finished"}
    for identity in through.cells:
        assert_same(through, broken, identity)
        assert through.cell(identity).result()["hardware"]["processes"] == 2


def test_more_processes_than_prompts(make_run: MakeRun, together: Together) -> None:
    training = {"prompts": 1, "group_size": 2, "evaluation_prompts": 1, "updates": 3}
    single = finished(make_run("single", training, [EXACT]))
    several = make_run("several", training, [EXACT])
    together(several, 3)
    assert_close(single, several)


def test_what_one_process_cannot_do_fails_the_guilty_cell_and_no_other(make_run: MakeRun, together: Together) -> None:
    """The reward of the broken cell raises in the last process only."""
    cells = [EXACT, {**EXACT, "task.fail_rank": 2}]
    run = make_run("broken", {"prompts": 3, "updates": 3}, cells)
    whole, broken = run.cells
    assert together(run, 3) == {whole: "finished", broken: "failed"}
    error = run.cell(broken).error() or ""
    assert "the reward is broken" in error
    assert "(process 2 of 3)" in error
    assert "in score" in error  # the traceback of that process
    alone = finished(make_run("alone", {"prompts": 3, "updates": 3}, [EXACT]))
    close(numbers(alone, whole), numbers(run, whole), whole)


def test_processes_whose_weights_differ_end_without_a_result(make_run: MakeRun, together: Together) -> None:
    """One process skips the steps that the other makes."""
    run = make_run("torn", {"updates": 2}, [{"weight": {"name": "letters_task:torn", "process": 1}}])
    with pytest.raises(ProcessGroupLost, match="process 1 of 2 does not have the numbers of process 0 any more"):
        together(run, 2)
    folder = run.cell(run.cells[0])
    assert (folder.result(), folder.error(), len(folder.metrics())) == (None, None, 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_out_of_memory_in_one_process_halves_the_pieces_of_all(
    make_run: MakeRun, together: Together, rank: int, capfd: pytest.CaptureFixture[str]
) -> None:
    training = {"updates": 3, "updates_per_rollout": 3}
    cells = [{**EXACT, "weight": {"name": "letters_task:hungry", "process": rank}}]
    run = make_run("short", training, cells)
    assert set(together(run, 2).values()) == {"finished"}
    assert "goes on with micro-batches of 4 rows" in capfd.readouterr().out
    assert_close(finished(make_run("single", training, cells)), run)
