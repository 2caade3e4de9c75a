"""π_old of 16-bit policies: the trainer's where a rollout serves several updates, or as decoding recorded it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from klab.harness.policy.scores import token_scores
from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.harness.training.forward import ForwardPass
from klab.harness.training.loss import token_batch
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from tests.support.training_records import MakeRun, StopAfter, assert_same, finished

REUSED: dict[str, Any] = {"updates_per_rollout": 2, "minibatches": 2, "updates": 8, "evaluate_every": 4}
NARROW = {"dtype": "bfloat16"}


def pack_of(run: Run) -> Pack:
    pack = Pack([prepare_cell(run, run.cell(run.cells[0]))[0]])
    pack.collect_due_rollouts()
    return pack


@pytest.mark.parametrize("engine", ["stacked", "transformers"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("asked", [None, "sampler", "trainer"])
def test_whose_log_probabilities_the_ratio_is_to(make_run: MakeRun, engine: str, dtype: str, asked: str | None) -> None:
    """Decoding is made to disagree by a quarter of a nat; on this processor it may not disagree by itself."""
    training = {**REUSED, **({"old_logprobs": asked} if asked else {})}
    pack = pack_of(make_run(training=training, policy={"dtype": dtype, "engine": engine}))
    member, experience = pack.members[0], pack.pending[0][0]
    experience.rollout.logp += 0.25
    now = token_scores(pack.policy, [experience.rollout])[0].logp.detach()
    behaviour = token_batch(member, experience, ForwardPass(now, now)).logp_behaviour
    if asked == "trainer" or (asked is None and dtype == "bfloat16"):
        assert torch.equal(behaviour, now)
    else:
        assert experience.old_logprobs is None
        assert torch.equal(behaviour, experience.rollout.logp)


def test_every_ratio_is_one_before_the_first_update(make_run: MakeRun) -> None:
    pack = pack_of(make_run(training={**REUSED, "minibatches": 1}, policy=NARROW))
    pack.pending[0][0].rollout.logp += 0.25
    first, second = pack.advance()[0], pack.advance()[0]
    assert (first["ratio_mean"], first["ratio_max"], first["kl_behaviour"]) == (1.0, 1.0, 0.0)
    assert second["kl_behaviour"] > 0.0


def test_a_resumed_cell_goes_on_with_the_rollouts_old_policy(make_run: MakeRun) -> None:
    through = finished(make_run("through", training=REUSED, policy=NARROW))
    broken = make_run("broken", training=REUSED, policy=NARROW)
    while set(run_cells(broken.path, broken.cells, stop=StopAfter(2)).values()) != {"finished"}:
        pass
    assert_same(through, broken, through.cells[0])
