"""An update whose weights are those that drew the rollout does not compute its tokens again: same bits, less time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from klab.harness.policy.stacked.native.engine import NativeLayers
from klab.harness.store import Run
from klab.harness.training.pack import Pack
from klab.harness.training.pack_settings import PackSettings
from klab.harness.training.runner import prepare_cell
from tests.support.training_records import MakeRun, finished, numbers, weights

pytestmark = pytest.mark.bits

CASES: dict[str, dict[str, Any]] = {
    "on policy": {},
    "two updates per rollout": {"updates_per_rollout": 2},
    "some groups dropped": {"equal_groups": "drop"},
}


def pack(run: Run) -> Pack:
    return Pack([prepare_cell(run, run.cell(identity))[0] for identity in run.cells])


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every pass that keeps what a backward pass needs, outside of sampling."""
    counts: list[int] = []
    extend, states = NativeLayers.extend, NativeLayers.states

    def counted(self: NativeLayers, *given: Any) -> Any:
        def noted(layers: NativeLayers, addresses: Any, trees: Any, activations: Any) -> Any:
            counts.append(len(trees.tokens))
            return extend(layers, addresses, trees, activations)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(NativeLayers, "extend", noted)
            return states(self, *given)

    monkeypatch.setattr(NativeLayers, "states", counted)
    return counts


@pytest.mark.parametrize("case", CASES)
def test_known_states_change_no_bit(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, forwarded: list[int], case: str
) -> None:
    known = finished(make_run("known", CASES[case], seeds=2))
    with_states = len(forwarded)
    monkeypatch.setattr(PackSettings, "updates_what_it_drew", False)
    again = finished(make_run("again", CASES[case], seeds=2))
    without = len(forwarded) - with_states
    for identity in known.cells:
        assert numbers(known, identity) == numbers(again, identity)
        mine, other = (weights(run, identity) for run in (known, again))
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    updates = 2 * 6
    assert without == updates
    if case != "some groups dropped":
        assert with_states == updates - updates // CASES[case].get("updates_per_rollout", 1)


@pytest.mark.parametrize(
    "training",
    [{"lag": 1}, {"minibatches": 2}, {"micro_batch": 8}, {"behaviour": "reference"}],
    ids=["old rollouts", "minibatches", "micro-batches", "another policy's"],
)
def test_what_no_update_needs_is_not_kept(make_run: MakeRun, training: dict[str, Any]) -> None:
    trained = pack(make_run(training=training))
    trained.collect_due_rollouts()
    assert all(experience.rollout.known_states is None for drawn in trained.pending for experience in drawn)


def test_states_are_given_up_after_the_first_update(make_run: MakeRun) -> None:
    trained = pack(make_run(training={"updates_per_rollout": 2}))
    trained.collect_due_rollouts()
    rollout = trained.pending[0][0].rollout
    assert rollout.known_states is not None
    trained.advance()
    assert trained.pending[0][0].rollout is rollout
    assert rollout.known_states is None
