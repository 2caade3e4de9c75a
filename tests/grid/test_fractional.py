"""Design fractional: which cells of a product are chosen."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import yaml

from klab.grid import UserError
from klab.grid.fractional import FractionalDesign, choose
from klab.grid.grid_file import parse_grid


def grid_of(**changes):
    data = {
        "name": "a",
        "task": "addition",
        "objective": {"algorithm": "grpo"},
        "axes": {
            "estimator": ["k3", "k1", "k2"],
            "placement": ["loss", "reward", "advantage"],
            "weight": ["ppo_clip", "ratio", "truncate"],
            "advantage": ["group_norm", "leave_one_out", "batch_norm"],
        },
        "training": {"updates_per_rollout": 2},
        **changes,
    }
    return parse_grid(yaml.safe_dump(data, sort_keys=False), "study.yaml")


def words(codes, levels):
    """The generalized word counts A_1, A_2, …, straight from their definition by characters of the groups."""
    codes, counts = np.asarray(codes), np.zeros(len(levels) + 1)
    for powers in itertools.product(*(range(level) for level in levels)):
        weight = sum(power > 0 for power in powers)
        phase = sum(code * power / level for code, power, level in zip(codes.T, powers, levels, strict=True))
        counts[weight] += abs(np.exp(2j * np.pi * phase).mean()) ** 2
    return counts[1:]


@pytest.mark.parametrize(
    ("levels", "cells", "least"),
    [
        ((2, 2, 2, 2), 8, [0, 0, 0, 1]),
        ((2, 2, 2, 2, 2), 16, [0, 0, 0, 0, 1]),
        ((3, 3, 3, 3), 27, [0, 0, 0, 2]),
        ((4, 4, 4), 16, [0, 0, 3]),
    ],
)
def test_known_fractions_with_the_fewest_words_are_found(levels, cells, least):
    codes = list(itertools.product(*map(range, levels)))
    chosen, _ = choose(codes, FractionalDesign(cells), 0)
    assert words([codes[index] for index in chosen], levels) == pytest.approx(least, abs=1e-9)


def test_pairs_of_axes_are_nearly_as_balanced_as_they_can_be():
    levels = (3, 4, 4, 4, 4, 3)
    codes = list(itertools.product(*map(range, levels)))
    chosen, held_out = choose(codes, FractionalDesign(216, 24), 5)
    assert 5 in chosen
    assert not set(chosen) & set(held_out)
    assert (len(set(chosen)), len(set(held_out))) == (216, 24)
    table = np.asarray(codes)[chosen]
    for a, b in itertools.combinations(range(6), 2):
        counts = np.zeros((levels[a], levels[b]))
        np.add.at(counts, (table[:, a], table[:, b]), 1)
        assert np.abs(counts - counts.mean()).max() <= 3


def test_the_choice_is_the_same_in_every_process_and_another_with_another_draw():
    code = (
        "import itertools, sys; from klab.grid.fractional import *;"
        "c = list(itertools.product(range(3), range(4), range(2), range(3)));"
        "print(choose(c, FractionalDesign(24, 6, int(sys.argv[1])), 0))"
    )
    found = [
        subprocess.run([sys.executable, "-c", code, draw], capture_output=True, text=True, check=True).stdout
        for draw in ("0", "0", "1")
    ]
    assert found[0] == found[1] != found[2]


def test_a_grid_file_with_a_fraction():
    grid = grid_of(design={"name": "fractional", "cells": 54, "holdout": 9}, seeds=2)
    assert grid.design == "fractional"
    assert len(grid.groups) == 63
    assert len(grid.cells) == 126
    assert grid.baseline in grid.groups
    assert grid.fraction.candidates == 81
    assert len(grid.fraction.held_out) == 9
    assert set(grid.fraction.held_out) <= set(grid.groups)
    assert grid.baseline not in grid.fraction.held_out
    product = grid_of(seeds=2)
    assert set(grid.groups) < set(product.groups), "cells of a fraction are those of the product"


def test_excluded_combinations_are_not_chosen():
    rule = [{"placement": "reward", "weight": "ratio"}]
    grid = grid_of(design={"name": "fractional", "cells": 40}, exclude=rule)
    assert grid.fraction.candidates == 72
    assert not any(c.objective.placement == "reward" and c.objective.weight == "ratio" for c in grid.cells)


def test_spellings_of_one_configuration_are_one_candidate():
    axes = {"placement": ["none", "loss", "reward"], "estimator": ["k3", "k1"], "weight": ["ppo_clip", "ratio"]}
    grid = grid_of(design={"name": "fractional", "cells": 6}, axes=axes)
    assert grid.fraction.candidates == 10, "without a KL term the estimator does nothing"
    assert len(grid.groups) == 6


@pytest.mark.parametrize(
    ("design", "message"),
    [
        ({"name": "fractional"}, "missing: how many configurations?"),
        ("fractional", "missing: how many configurations?"),
        ({"name": "fractional", "cells": 81}, "no fraction: the axes make 81 combinations"),
        ({"name": "fractional", "cells": 8, "hold_out": 2}, "did you mean 'holdout'"),
        ({"name": "fractional", "cells": "many"}, "not a whole number"),
        ({"name": "fractional", "cells": 8, "holdout": -1}, "not a whole number of at least 0"),
        ({"name": "fractionl", "cells": 8}, "did you mean 'fractional'"),
        ({"name": "product", "cells": 8}, "takes no settings"),
        (3, "unknown design"),
    ],
)
def test_a_design_that_cannot_be(design, message):
    with pytest.raises(UserError, match=r"(?s)study\.yaml.*design") as caught:
        grid_of(design=design)
    assert message in str(caught.value)
