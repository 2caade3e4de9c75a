"""Cells that get their seeds together are those that get them one by one."""

from __future__ import annotations

from dataclasses import replace

from klab.grid import Cell, Objective
from klab.grid.schema.sections import load_section


def test_seeds_together_or_one_by_one() -> None:
    sections = [load_section(*each) for each in (("task", {"name": "addition"}), ("policy", {"name": "tiny"}))]
    cell = Cell(Objective(estimator="k1", beta=0.1), *sections, load_section("training", {"lr": 0.1}), 0)  # type: ignore[arg-type]
    for seeded in cell.with_seeds([0, 7]):
        alone = replace(cell, seed=seeded.seed)
        assert (seeded.id, seeded.group, seeded.sections) == (alone.id, alone.group, alone.sections)
        assert Cell.from_resolved(seeded.resolved()) == seeded
    slower = replace(cell, training=cell.training.model_copy(update={"lr": 0.2}))
    assert slower.sections != cell.sections
    assert slower.with_seeds([7])[0].id != cell.with_seeds([7])[0].id


def test_whose_objective_it_is() -> None:
    assert not Objective().is_custom
    assert Objective(weight="tests.support.custom_values:Weight").is_custom
    assert Objective(**Objective(path="./mine.py:path").settings()).is_custom
