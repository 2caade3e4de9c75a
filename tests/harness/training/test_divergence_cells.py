"""Cells of RPG: the KL term is one to the policy of the rollout, in each of its forms."""

from __future__ import annotations

import pytest

from tests.support.training_records import MakeRun, finished, numbers, weights

FORMS = [{"estimator": estimator, "divergence": name} for name in ("reverse", "forward") for estimator in ("k1", "k3")]


def test_every_form_of_rpg_is_trained_against_the_policy_of_the_rollout(make_run: MakeRun) -> None:
    cells = [{"algorithm": "rpg", "beta": 2.0, **form} for form in FORMS]
    cells.append({"algorithm": "rpg_reinforce", "beta": 2.0, "divergence": "forward"})
    run = finished(make_run("rpg", {"updates_per_rollout": 2, "equal_groups": "keep"}, cells))
    ends = []
    for identity in run.cells:
        rows = numbers(run, identity)["metrics"]
        for first, second in zip(rows[::2], rows[1::2], strict=True):
            assert first["k3"] == pytest.approx(0.0, abs=1e-9)
            assert second["k3"] > 1e-6
        ends.append(weights(run, identity))
    name = next(iter(ends[0]))
    assert len({tuple(end[name].flatten().tolist()) for end in ends}) == len(cells)
