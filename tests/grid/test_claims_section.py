"""The section `claims` of a grid file: which cells a claim compares, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from klab.grid import Cell, Grid, UserError, parse_grid
from klab.grid.claims import StatedClaim
from klab.harness.dispatch.merging import _with_one_of_each

PRODUCT = {"estimator": ["k1", "k2", "k3"], "placement": ["loss", "none"], "beta": [0.01, 0.05]}
ONE_AT_A_TIME = {**PRODUCT, "weight": ["ppo_clip", {"name": "power", "q": 0.5}, {"name": "power", "q": 0.25}]}


def grid_of(*claims: Mapping[str, Any], **sections: Any) -> Grid:
    written = [{"claim": f"claim {index}", "expect": "higher", **claim} for index, claim in enumerate(claims)]
    data = {
        "name": "study",
        "task": {"name": "addition", "digits": 2},
        "training": {"updates_per_rollout": 2},
        "objective": {"algorithm": "grpo", "beta": 0.05},
        "axes": PRODUCT,
        "seeds": 2,
        **({"claims": written} if claims else {}),
        **sections,
    }
    given = {key: value for key, value in data.items() if value is not None}
    return parse_grid(json.dumps(given), "study.yaml")


def _words(cell: Cell) -> str:
    """What a cell is on the axes of these tests; settings without effect left out."""
    form = cell.objective.canonical(cell.training.on_policy)
    words = [form["placement"]] if form["placement"] == "none" else [form["estimator"], form["placement.beta"]]
    if form["weight"] != "ppo_clip":
        words.append(f"{form['weight']} {form['weight.q']:g}")
    return " ".join(map(str, words))


def compared(grid: Grid, claim: int = 0) -> list[tuple[list[str], list[str]]]:
    """The matches of a claim in words."""
    names = {cell.group: _words(cell) for cell in grid.cells}
    return [
        ([names[group] for group in match.cells], [names[group] for group in match.against])
        for match in grid.claims[claim].matches
    ]


def test_cells_of_a_product_are_compared_with_those_that_differ_in_nothing_else() -> None:
    grid = grid_of(
        {"cells": {"estimator": "k1"}, "against": {"estimator": "k2"}},
        {"cells": {"estimator": ["k1", "k2"], "placement": "loss"}, "where": {"beta": 0.01}},
        {"cells": {"placement": "none"}, "where": {"estimator": "k1"}},
        {"cells": {"estimator": "k1", "placement": "loss"}, "against": {"estimator": "k1", "placement": "none"}},
    )
    # with placement none the estimator does nothing: both sides are one algorithm there
    assert compared(grid) == [(["k1 0.01"], ["k2 0.01"]), (["k1 0.05"], ["k2 0.05"])]
    assert compared(grid, 1) == [(["k1 0.01", "k2 0.01"], ["k3 0.01"])]
    assert compared(grid, 2) == [(["none"], ["k1 0.01"]), (["none"], ["k1 0.05"])]
    assert compared(grid, 3) == [(["k1 0.01"], ["none"]), (["k1 0.05"], ["none"])]
    assert all(match.alike for claim in grid.claims for match in claim.matches)
    assert [claim.unmatched for claim in grid.claims] == [1, 0, 0, 0]
    assert grid.claims[0].compared.endswith("2 comparisons; 1 more without a counterpart are left out")


def test_changes_of_one_axis_are_compared_with_the_baseline() -> None:
    grid = grid_of(
        {"cells": {"estimator": "k1"}},
        {"cells": {"placement": "none"}},
        {"cells": {"weight": {"name": "power"}}},
        {"cells": {"weight": "power(q=0.5)"}},
        {"cells": {"weight": {"name": "power", "q": 0.25}}, "against": {"placement": "none"}},
        {"cells": {"beta": 0.01}},
        design="one_at_a_time",
        axes=ONE_AT_A_TIME,
    )
    assert compared(grid, 0) == [(["k1 0.05"], ["k3 0.05"])]
    assert compared(grid, 1) == [(["none"], ["k3 0.05"])]
    assert compared(grid, 2) == [(["k3 0.05 power 0.5", "k3 0.05 power 0.25"], ["k3 0.05"])]
    assert compared(grid, 3) == [(["k3 0.05 power 0.5"], ["k3 0.05"])]
    assert compared(grid, 4) == [(["k3 0.05 power 0.25"], ["none"])]
    assert compared(grid, 5) == [(["k3 0.01"], ["k3 0.05"])]


def test_an_axis_that_does_nothing_in_a_cell_fits_any_value() -> None:
    axes = {"placement": ["none", "reward", "loss"], "estimator": ["k1", "k3"], "beta": [0.01, 0.05]}
    exclude = [{"placement": ["none", "reward"], "estimator": "k3"}, {"placement": "loss", "estimator": "k1"}]
    objective = {"algorithm": "grpo", "placement": "none", "estimator": "k1", "beta": 0.05}
    grid = grid_of(
        {"cells": {"placement": ["reward", "loss"]}, "against": {"placement": "none"}},
        {"cells": {"placement": "loss"}, "where": {"beta": 0.01}},
        axes=axes,
        exclude=exclude,
        objective=objective,
    )
    assert sorted(compared(grid)) == [([f"{k} {beta}"], ["none"]) for k in ("k1", "k3") for beta in axes["beta"]]
    assert compared(grid, 1) == [(["k3 0.01"], ["none"])]
    product = grid_of(
        {"cells": {"placement": "none"}}, {"cells": {"placement": "none"}, "against": {"placement": "loss"}}
    )
    # beside the baseline an idle axis has the baseline's value
    assert compared(product) == [(["none"], ["k3 0.05"])]
    assert len(compared(product, 1)) == 6


def test_listed_cells_are_named_by_their_own_keys() -> None:
    cells = [{}, {"estimator": "k1"}, {"weight": {"name": "power", "q": 0.5}, "beta": 0.01}]
    grid = grid_of({"cells": {"estimator": "k1"}}, {"cells": {"weight": "power"}}, axes=None, cells=cells)
    assert compared(grid, 0) == [(["k1 0.05"], ["k3 0.05"])]
    # the only cell of its kind has another β, too: it is compared with the baseline itself, and that is said
    assert compared(grid, 1) == [(["k3 0.01 power 0.5"], ["k3 0.05"])]
    assert [match.alike for match in grid.claims[1].matches] == [False]
    assert "between means of unlike configurations" in grid.claims[1].compared


def test_named_algorithms_are_matched_on_what_the_file_writes_beside_them() -> None:
    axes = {"algorithm": ["grpo", "rloo", "dr_grpo"], "training.lr": [1.0e-4, 3.0e-4]}
    grid = grid_of(
        {"cells": {"algorithm": "rloo"}},
        {"cells": {"training.lr": 1.0e-4}},
        objective={"algorithm": "grpo"},
        axes=axes,
        training={"updates_per_rollout": 2, "lr": 3.0e-4},
    )
    named = {cell.group: (cell.algorithm, cell.training.lr) for cell in grid.cells}
    found = [
        [(named[one], named[other]) for match in claim.matches for one, other in match.pairs] for claim in grid.claims
    ]
    assert found[0] == [(("rloo", lr), ("grpo", lr)) for lr in axes["training.lr"]]
    assert found[1] == [((name, 1.0e-4), (name, 3.0e-4)) for name in axes["algorithm"]]
    listed = grid_of(
        {"cells": {"algorithm": "rloo"}},
        objective={"algorithm": "grpo"},
        axes=None,
        cells=[{}, {"algorithm": "rloo"}, {"weight": {"name": "power", "q": 0.5}}],
    )
    (match,) = listed.claims[0].matches
    assert match.alike
    assert match.against == (listed.baseline,)


def test_every_task_is_compared_by_itself() -> None:
    tasks = [{"name": "addition", "digits": digits} for digits in (1, 2)]
    claims = [
        {"cells": {"estimator": "k1"}, "where": {"placement": "loss", "beta": 0.05}},
        {"cells": {"estimator": "k1", "task": tasks[0]}, "where": {"placement": "loss", "beta": 0.05}},
        {"cells": {"estimator": "k1"}, "where": {"placement": "loss", "beta": 0.05, "task.digits": 2}},
    ]
    for axes in ({"task": tasks, **PRODUCT}, {"task.digits": [1, 2], **PRODUCT}):
        if "task" not in axes:
            claims[1] = {**claims[1], "cells": {"estimator": "k1", "task.digits": 1}}
        grid = grid_of(*claims, axes=axes)
        digits = {cell.group: cell.task.digits for cell in grid.cells}  # type: ignore[union-attr]
        found = [
            [digits[group] for match in claim.matches for group in match.cells + match.against] for claim in grid.claims
        ]
        assert found == [[1, 1, 2, 2], [1, 1], [2, 2]]


def test_a_fractional_design_compares_means_where_no_two_cells_are_alike() -> None:
    axes = {
        "estimator": ["k1", "k3"],
        "weight": ["ppo_clip", "truncate", "ratio"],
        "training.lr": [1.0e-4, 3.0e-4, 1.0e-3],
        "beta": [0.01, 0.05],
    }
    training = {"updates_per_rollout": 2, "lr": 3.0e-4}
    design = {"name": "fractional", "cells": 20, "holdout": 0}
    grid = grid_of({"cells": {"estimator": "k1"}}, design=design, axes=axes, training=training)
    sides = {cell.group: cell.objective.estimator for cell in grid.cells}
    (claim,) = grid.claims
    assert all(match.alike for match in claim.matches)
    assert {sides[group] for group in claim.cells} == {"k1"}
    assert {sides[group] for group in claim.against} == {"k3"}
    few = {"name": "fractional", "cells": 10, "holdout": 0}
    apart = grid_of(
        {"cells": {"estimator": "k1", "weight": "ratio"}, "against": {"estimator": "k3", "weight": "truncate"}},
        design=few,
        axes={**axes, "training.prompts": [8, 16, 24]},
        training=training,
    )
    (match,) = apart.claims[0].matches
    assert not match.alike
    cells = {cell.group: (cell.objective.estimator, cell.objective.weight) for cell in apart.cells}
    assert [{cells[group] for group in side} for side in (match.cells, match.against)] == [
        {("k1", "ratio")},
        {("k3", "truncate")},
    ]


def test_claims_are_about_the_configurations_before_they_choose_their_settings() -> None:
    tune = {"training.lr": [1.0e-4, 3.0e-4], "seeds": 2}
    grid = grid_of({"cells": {"estimator": "k1"}, "where": {"placement": "loss", "beta": 0.05}}, tune=tune)
    assert compared(grid) == [(["k1 0.05"], ["k3 0.05"])]
    with pytest.raises(UserError, match="is no axis of this study"):
        grid_of({"cells": {"training.lr": 1.0e-4}}, tune=tune)


def test_claims_change_no_cell() -> None:
    plain, claimed = grid_of(), grid_of({"cells": {"estimator": "k1"}})
    assert claimed.cells == plain.cells
    assert [cell.id for cell in claimed.cells] == [cell.id for cell in plain.cells]
    assert plain.claims == ()


@pytest.mark.parametrize(
    ("claim", "key", "said"),
    [
        (
            {"cells": {"estimater": "k1"}},
            "claims.0.cells",
            "did you mean 'estimator'? Valid: estimator, placement, beta",
        ),
        ({"cells": {"weight": "one"}}, "claims.0.cells", "is no axis of this study (got 'weight')"),
        (
            {"cells": {"estimator": "k4"}},
            "claims.0.cells.estimator",
            "(got 'k4'); did you mean 'k3'? Valid: k1, k2, k3",
        ),
        ({"cells": {"beta": [0.01, 0.02]}}, "claims.0.cells.beta", "no cell of this grid has this value (got 0.02)"),
        ({"cells": {"estimator": []}}, "claims.0.cells.estimator", "names no value"),
        ({"cells": {}}, "claims.0.cells", "names no value of an axis"),
        ({"cells": {"estimator": "k1"}, "where": {"placement": "nome"}}, "claims.0.where.placement", "'none'"),
        ({"cells": {"estimator": "k3"}}, "claims.0.cells", "are the baseline's own values"),
        ({"cells": {"estimator": "k1"}, "against": {}}, "claims.0.against", "names no value of an axis"),
        ({"cells": {"estimator": "k1"}, "against": {"estimator": "k1"}}, "claims.0.against", "are the same cells"),
        ({"cells": {"estimator": ["k1", "k2"]}, "against": {"estimator": "k2"}}, "claims.0.against", "4 of these are"),
        ({"cells": {"estimator": "k1"}, "where": {"placement": "none"}}, "claims.0", "are the same algorithm"),
        ({"cells": {"estimator": "k1"}, "expect": "hihger"}, "claims.0.expect", "did you mean 'higher'"),
        ({"cells": {"estimator": "k1"}, "scor": "reward"}, "claims.0", "did you mean 'score'"),
        ({"cells": {"estimator": "k1"}, "score": "rewart"}, "claims.0.score", "did you mean 'reward'"),
        ({"cells": {"estimator": "k1"}, "delta": 0}, "claims.0.delta", "greater than 0"),
        ({"cells": {"estimator": "k1"}, "claim": ""}, "claims.0.claim", "at least 1 character"),
        ({"cells": "k1"}, "claims.0.cells", "dictionary"),
        (
            {"cells": {"estimator": "k1"}, "score": "reverse_kl_final", "expect": "equal"},
            "claims.0.delta",
            "which differences of this score count as none",
        ),
    ],
)
def test_a_wrong_claim_costs_one_line(claim: Mapping[str, Any], key: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        grid_of(claim)
    assert caught.value.key == key
    assert said in str(caught.value)
    assert str(caught.value).startswith("study.yaml: ")


def test_further_errors_name_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"claims: not a list of claims"):
        grid_of(claims={"claim": "a"})
    with pytest.raises(UserError, match=r"claims\.1\.claim: duplicate claim"):
        grid_of({"claim": "a", "cells": {"estimator": "k1"}}, {"claim": "a", "cells": {"estimator": "k2"}})
    tasks = {"task.digits": [1, 2], "estimator": ["k1", "k3"]}
    with pytest.raises(UserError, match="no task in common"):
        grid_of(
            {"cells": {"estimator": "k1", "task.digits": 1}, "against": {"estimator": "k3", "task.digits": 2}},
            axes=tasks,
        )
    with pytest.raises(UserError, match=r"claims\.0\.against: no cell of this grid has the baseline's values"):
        grid_of({"cells": {"estimator": "k1"}}, axes={"estimator": ["k1", "k2"], "placement": ["loss", "none"]})
    with pytest.raises(UserError, match=r"claims\.0\.cells: no cell of this grid fits"):
        grid_of({"cells": {"estimator": "k1", "beta": 0.01}}, design="one_at_a_time")


def test_an_equality_of_another_score_needs_a_margin_of_its_own() -> None:
    equal = {"cells": {"estimator": "k1"}, "score": "reverse_kl_final", "expect": "equal"}
    assert grid_of({**equal, "delta": 2.0}).claims[0].claim.delta == 2.0
    stated = grid_of({**equal, "score": None}, analysis={"score": "reverse_kl_final", "delta": 1.5})
    assert len(stated.claims) == 1
    assert len(grid_of({**equal, "score": "accuracy"}).claims) == 1


def test_merged_cells_stand_for_each_other_in_claims() -> None:
    grid = grid_of(
        {"cells": {"estimator": "k1"}, "where": {"placement": "loss"}},
        {"cells": {"estimator": "k2"}, "where": {"placement": "loss", "beta": 0.05}},
    )
    cells = {_words(cell): cell for cell in reversed(grid.cells)}
    first = next(cell for cell in grid.cells if _words(cell) == "k1 0.01")
    merged = _with_one_of_each(grid, [[first, cells["k2 0.01"]]], keep=())
    assert compared(merged, 0) == [(["k1 0.01"], ["k3 0.01"]), (["k1 0.05"], ["k3 0.05"])]
    same = [cell for cell in grid.cells if _words(cell) in ("k2 0.05", "k3 0.05")]
    with pytest.raises(UserError, match=r"study.yaml: claims\.1: its two sides are the same algorithm"):
        _with_one_of_each(grid, [[cell for cell in same if cell.seed == 0]], keep=())


def test_a_claim_that_loses_all_its_cells_is_none() -> None:
    (claim,) = grid_of({"cells": {"estimator": "k1"}, "where": {"placement": "loss", "beta": 0.05}}).claims
    assert isinstance(claim, StatedClaim)
    assert claim.renamed({claim.cells[0]: "other"}) is not None
    assert claim.renamed({claim.cells[0]: None}) is None
    assert claim.renamed({claim.cells[0]: claim.against[0]}) is None


PROXIES = """
name: over
task: {name: proxy, gold: strings, pairs: 512}
objective: {algorithm: rloo, placement: none}
design: list
cells:
  - {}
  - {task.pairs: 2048}
  - {placement: reward}
  - {placement: reward, task.pairs: 2048}
claims:
  - {claim: more pairs leave more gold, cells: {task.pairs: 2048}, score: parts.gold, expect: higher}
"""


def test_reward_models_of_one_gold_reward_are_compared() -> None:
    grid = parse_grid(PROXIES, "over.yaml")
    (claim,) = grid.claims
    group = {(cell.objective.placement, cell.task.pairs): cell.group for cell in grid.cells}
    assert [(match.cells, match.against, match.alike) for match in claim.matches] == [
        ((group[placement, 2048],), (group[placement, 512],), True) for placement in ("none", "reward")
    ], "matched by placement, though their task sections differ"


def test_proxies_of_two_gold_rewards_are_two_tasks() -> None:
    two = PROXIES.replace("task.pairs: 2048}", "task.gold: {name: strings, seed: 1}, task.pairs: 2048}")
    two = two.replace("cells: {task.gold: {name: strings, seed: 1}, ", "cells: {")
    with pytest.raises(UserError, match="no task in common"):
        parse_grid(two, "over.yaml")
