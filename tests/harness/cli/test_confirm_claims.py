"""`klab confirm --claims` judges claims anew on fresh seeds; `klab extend --undecided` adds seeds to open ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Cell
from klab.harness.store import Run
from klab.reports import load_run, render
from klab.reports.claim_tables import claim_notes
from klab.reports.claims import judged
from klab.reports.confirmation import FIRST_SEED
from klab.reports.extension import extension
from tests.support.claimed_run import NOISE, Scores, fill, grid_of

Ask = Callable[..., Any]
AXES = {"estimator": ["k1", "k2", "k3"], "placement": ["loss", "reward"]}
CLAIMS = (
    {"claim": "k1 is worse", "cells": {"estimator": "k1", "placement": "loss"}},
    {"claim": "k2 is worse", "cells": {"estimator": "k2", "placement": "loss"}, "delta": 0.001},
    {"claim": "k1 in the reward is worse", "cells": {"estimator": "k1", "placement": "reward"}, "delta": 0.001},
)


def _scores(cell: Cell) -> Scores:
    k1, k2 = cell.objective.estimator == "k1", cell.objective.estimator == "k2"
    loss = cell.objective.placement == "loss"
    worse = 0.1 * (k1 and loss)
    drawn = NOISE[cell.seed % 6] * k1 + NOISE[(cell.seed + 1) % 6] * k2 + NOISE[(cell.seed + 3) % 6] * loss
    return {"reward": 0.6 + 0.02 * (cell.seed % 7) - worse + drawn}


def _run(folder: Path, *claims: Any, **sections: Any) -> Run:
    return fill(Run.create(folder, grid_of(*(claims or CLAIMS), **{"axes": AXES, **sections})), _scores)


def _configurations(run: Run) -> set[tuple[str, str]]:
    cells = [run.cell(identity).cell() for identity in run.cells]
    return {(cell.objective.estimator, cell.objective.placement) for cell in cells}


def test_decided_claims_are_judged_anew_on_fresh_seeds(tmp_path: Path, digits: Path, ask: Ask) -> None:
    few = {"updates": 1, "prompts": 2, "group_size": 2, "evaluation_prompts": 2}
    training = {**few, "evaluation_samples": 2, "final_evaluation_samples": 2}
    run = _run(tmp_path / "study", axes=AXES, training=training, policy={"name": "hf", "model": str(digits)})
    explored = judged(load_run(run.path))
    assert [each.verdict for each in explored] == ["holds", "undecided", "undecided"]
    before = (run.path / "manifest.json").read_bytes()
    ask("confirm", str(run.path), "--claims", "--seeds", "2", "--on", "here")
    assert (run.path / "manifest.json").read_bytes() == before
    fresh = Run.open(tmp_path / "study-confirm-claims")
    assert _configurations(fresh) == {("k1", "loss"), ("k3", "loss")}
    assert {fresh.resolved(identity)["seed"] for identity in fresh.cells} == {FIRST_SEED, FIRST_SEED + 1}
    study = load_run(fresh.path)
    (again,) = judged(study)
    assert (again.claim, again.late, again.rows[0].n, again.cells) == ("k1 is worse", 0, 2, explored[0].cells)
    dropped = "Not judged, because some of its cells were not run again"
    assert claim_notes(study) == (f"{dropped}: k2 is worse", f"{dropped}: k1 in the reward is worse")
    assert any("the cells of claims of study on fresh seeds" in note for note in study.notes)
    assert any("Cells of claims of study were run again" in note for note in load_run(run.path).notes)
    page = render(fresh.path, tmp_path / "page", figures=False).read_text()
    assert "Claims in exploration and confirmation" in page
    assert "holds here: −0.100" in page
    assert "Not run again: k2 is worse; k1 in the reward is worse." in page
    manifest = (fresh.path / "manifest.json").read_bytes()
    ask("confirm", str(run.path), "--claims", "--seeds", "2", "--on", "here")
    assert (fresh.path / "manifest.json").read_bytes() == manifest
    refused = ask("confirm", str(run.path), "--claims", "--undecided", "--seeds", "2", code=2)
    assert "--claims: the confirmation study-confirm-claims has decided (got 'all')" in refused
    assert "--seeds" in ask("confirm", str(run.path), "--claims", "--seeds", "3", code=2)


def test_all_claims_are_confirmed_where_that_is_asked(tmp_path: Path, ask: Ask) -> None:
    run = _run(tmp_path / "study")
    found = ask("confirm", str(run.path), "--claims", "--undecided", "--seeds", "4", "--dry-run", "--json")
    assert len(found["cells"]) == 4 * 4  # without k2 and k3 in the reward
    decided = ask("confirm", str(run.path), "--claims", "--seeds", "4", "--dry-run", "--json")
    assert len(decided["cells"]) == 2 * 4
    assert set(decided["cells"]) < set(found["cells"])
    assert "belongs to --claims" in ask("confirm", str(run.path), "--undecided", code=2)


def test_both_tasks_of_a_claim_are_confirmed(tmp_path: Path, ask: Ask) -> None:
    axes = {"task.digits": [1, 2], "estimator": ["k1", "k2", "k3"]}
    run = _run(tmp_path / "study", {"claim": "k1 is worse", "cells": {"estimator": "k1"}}, axes=axes)
    found = ask("confirm", str(run.path), "--claims", "--seeds", "3", "--dry-run", "--json")
    assert len(found["cells"]) == 2 * 2 * 3


def test_a_run_without_decided_claims_has_nothing_to_confirm(tmp_path: Path, ask: Ask) -> None:
    plain = _run(tmp_path / "plain", claims=None)
    assert "states no claim" in ask("confirm", str(plain.path), "--claims", "--dry-run", code=2)
    opened = _run(tmp_path / "open", CLAIMS[1])
    assert "none of its 1 claims is decided" in ask("confirm", str(opened.path), "--claims", "--dry-run", code=2)


def test_tuned_claims_are_confirmed_with_the_settings_that_were_kept(tmp_path: Path, ask: Ask) -> None:
    from klab.grid.tuning import launched
    from klab.harness.dispatch.tuning import settle

    grid = grid_of({"cells": {"estimator": "k1"}}, tune={"training.lr": [1e-4, 3e-4], "seeds": 2})
    run = Run.create(tmp_path / "study", launched(grid))

    def scores(cell: Cell) -> Scores:
        return {"reward": _scores(cell)["reward"] + 0.3 * (cell.training.lr == 1e-4)}

    fill(run, scores)
    with run.lock():
        settle(run)
    fill(run, scores)
    found = ask("confirm", str(run.path), "--claims", "--seeds", "2", "--dry-run", "--json")
    (claim,) = judged(load_run(run.path))
    assert len(found["cells"]) == 4
    kept = {identity.rpartition("-s")[0] for identity in found["cells"]}
    assert kept == {group.rpartition("-")[0] for group in (*claim.cells, *claim.against)}


def test_cells_of_open_claims_get_seeds(tmp_path: Path, ask: Ask) -> None:
    run = _run(tmp_path / "study", CLAIMS[2], analysis={"contrasts": [{"estimator": "k1"}], "delta": 0.5})
    study = load_run(run.path)
    found = extension(study, 3, undecided=True)
    assert (found.open, found.claims) == (0, 1)
    sides = {(cell.objective.estimator, cell.objective.placement) for cell in found.cells}
    assert sides == {("k1", "reward"), ("k3", "loss")}
    said = ask("extend", str(run.path), "--seeds", "3", "--undecided", "--dry-run")
    assert "0 open comparisons, 1 undecided claim, and the baseline" in " ".join(said.split())


@pytest.mark.parametrize("undecided", [False, True])
def test_a_decided_claim_gets_none(tmp_path: Path, undecided: bool) -> None:
    run = _run(tmp_path / "study", CLAIMS[0], analysis={"contrasts": [{"estimator": "k1"}]})
    found = extension(load_run(run.path), 3, undecided=undecided)
    assert len(found.cells) == (0 if undecided else 6 * 3)
    assert found.claims == 0
