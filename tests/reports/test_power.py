"""What a design can see is what `analyse` finds in simulated studies, and what textbooks say where they say it."""

from __future__ import annotations

import subprocess
import sys
from math import isnan

import numpy as np
import pytest
from scipy import stats

from klab.reports import analyse
from klab.reports.inference.error_rate import ALONE, ALPHA, SHARES, STATED, look_level, spent
from klab.reports.inference.power import (
    Noise,
    PlannedDesign,
    _bound,
    detectable_contrast,
    detectable_effect,
    seeds_needed,
)
from tests.benchmarks.error_rates import DESIGNS, IID, simulate


def test_two_cells_are_the_power_of_the_paired_t_test() -> None:
    difference = detectable_contrast(PlannedDesign((2,)), 6, Noise(0.1))
    noncentrality = difference / (0.1 * 2**0.5 / 6**0.5)
    assert stats.nct.sf(stats.t.isf(0.025, 5), 5, noncentrality) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(("others", "bound"), [(2, 2.21), (5, 2.51), (9, 2.69)])
def test_the_bound_of_many_contrasts_is_dunnetts(others: int, bound: float) -> None:
    """Two-sided, 5%, infinite degrees of freedom: Dunnett (1964), Biometrics 20:482, table II."""
    assert _bound((others,), 1e6, 1e6, 0.05) == pytest.approx(bound, abs=0.02)


def test_simulated_studies_have_the_power_that_was_promised() -> None:
    cells, seeds = DESIGNS["one"], 5
    difference = detectable_contrast(PlannedDesign((len(cells),)), seeds, Noise(1.0))
    means = np.asarray([difference * (index % 2) for index in range(len(cells))])
    generator, found = np.random.default_rng(seeds), []
    for _ in range(20):
        table = analyse(simulate(cells, seeds, IID, means, generator), cells[0]).contrasts
        found.append((table["verdict"].to_numpy() == "differs")[::2].mean())
    assert np.mean(found) == pytest.approx(0.8, abs=0.15)


def test_axes_of_a_product_are_seen_better_than_its_cells() -> None:
    design = PlannedDesign((27,), crossed=(("a", 3), ("b", 3), ("c", 3)))
    quiet, shaky = Noise(1.0), Noise(1.0, (("a", 1.0),))
    assert detectable_effect(design, "a", 5, quiet) < detectable_contrast(design, 5, quiet)
    assert detectable_effect(design, "a", 5, shaky) > 2 * detectable_effect(design, "a", 5, quiet)
    assert detectable_effect(design, "b", 5, shaky) == detectable_effect(design, "b", 5, quiet)
    assert detectable_contrast(design, 5, shaky) > detectable_contrast(design, 5, quiet)


def test_stated_contrasts_are_seen_better_and_looks_cost_a_little() -> None:
    everything, stated = PlannedDesign((20,)), PlannedDesign((20,), stated=2)
    early = PlannedDesign((20,), alpha=look_level((5,), 10))
    assert stated.contrast_alpha == pytest.approx(ALPHA * ALONE * STATED)
    seen = [detectable_contrast(design, 5, Noise(1.0)) for design in (stated, everything, early)]
    assert seen == sorted(seen)
    assert PlannedDesign((6,), crossed=(("a", 2), ("b", 3))).contrast_alpha == pytest.approx(ALPHA * SHARES[0])


def test_the_seeds_needed_are_the_fewest_that_see_the_difference() -> None:
    design = PlannedDesign((10,))

    def seen(seeds: int) -> float:
        return detectable_contrast(design, seeds, Noise(0.03))

    needed = seeds_needed(seen, 0.03)
    assert needed is not None
    assert seen(needed) <= 0.03 < seen(needed - 1)
    assert seeds_needed(seen, 1e-6) is None


def test_nothing_is_seen_with_one_seed_or_without_a_contrast() -> None:
    assert isnan(detectable_contrast(PlannedDesign((10,)), 1, Noise(1.0)))
    assert isnan(detectable_contrast(PlannedDesign((1,)), 5, Noise(1.0)))


def test_spending_is_that_of_lan_and_demets() -> None:
    """Their cumulative error for five equal looks at 5%: O'Brien and Fleming's, and Pocock's function."""
    brien = [spent(k / 5, "obrien_fleming") for k in range(1, 6)]
    assert brien == pytest.approx([1.17e-5, 0.00194, 0.0114, 0.0285, 0.05], rel=0.02)
    assert [spent(k / 5, "pocock") for k in range(1, 6)] == pytest.approx(
        [0.0148, 0.0262, 0.0354, 0.0432, 0.05], rel=0.01
    )


@pytest.mark.parametrize("spending", ["obrien_fleming", "pocock"])
def test_the_levels_of_all_looks_add_up_to_the_error_rate(spending: str) -> None:
    looks = (3, 5, 9, 12)
    levels = [look_level(looks[: k + 1], 12, spending) for k in range(4)]
    assert sum(levels) == pytest.approx(ALPHA)
    assert min(levels) > 0
    assert look_level((5,), 5, spending) == ALPHA
    assert look_level((5, 10, 15), 10, spending) == 0.0


def test_it_needs_neither_pandas_nor_torch() -> None:
    code = "import sys, klab.reports.inference.power; sys.exit(any(m in sys.modules for m in ('pandas', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
