"""Tasks are called by short names that tell them apart."""

from __future__ import annotations

from typing import Any

import pytest

from klab.grid import Cell, Objective
from klab.grid.schema.sections import load_section
from klab.reports.axes import axis_table, group_labels, task_label, task_labels

SUMS = {"name": "file", "path": "/data/of/mine/sums.parquet", "prompt": "q", "answer": "a"}


def cell(task: dict[str, Any]) -> Cell:
    given = {"task": task, "policy": {"name": "tiny"}, "training": {}}
    sections: list[Any] = [load_section(name, values) for name, values in given.items()]  # type: ignore[arg-type]
    return Cell(Objective(), *sections, 0)


@pytest.mark.parametrize(
    ("task", "label"),
    [
        ({"name": "addition", "digits": 3}, "addition(digits=3)"),
        ({"name": "addition", "digits": 15, "prompt_order": "least"}, "addition(digits=15, prompt_order=least)"),
        ({"name": "strings"}, "strings(symbols=8)"),
        ({"name": "strings", "length": 12}, "strings(symbols=8, length=12)"),
        ({"name": "proxy", "gold": {"name": "strings", "seed": 3}}, "proxy(strings(symbols=8, seed=3))"),
        (SUMS, "file(sums.parquet)"),
        ({**SUMS, "reward": ["math", {"name": "format", "weight": 0.5}]}, "file(sums.parquet)"),
        ({**SUMS, "label": "my sums"}, "my sums"),
        ({**SUMS, "path": "owner/sums"}, "file(sums)"),
        ({"name": "gsm8k"}, "gsm8k"),
        ({"name": "gsm8k", "path": "here/rows.jsonl"}, "gsm8k(rows.jsonl)"),
        ({"name": "math"}, "math"),
        ({"name": "mine.tasks:Sorting", "length": 5}, "Sorting(length=5)"),
        ({"name": "mine.tasks:Sorting", "length": 5, "label": "sorting"}, "sorting"),
    ],
)
def test_a_task_has_a_short_name(task: dict[str, Any], label: str) -> None:
    assert task_label(cell(task)) == label


def test_tasks_of_one_name_are_told_apart_by_what_differs() -> None:
    tasks = {
        "one": SUMS,
        "two": {**SUMS, "reward": ["math", {"name": "mine.rewards:short", "weight": 0.5}]},
        "three": {**SUMS, "path": "/elsewhere/sums.parquet", "reward_seconds": 3},
        "four": {"name": "gsm8k"},
        "five": {"name": "gsm8k", "reward_seconds": 3},
    }
    assert task_labels({name: cell(task) for name, task in tasks.items()}) == {
        "one": "file(sums.parquet, reward=exact, path=/data/of/mine/sums.parquet)",
        "two": "file(sums.parquet, reward=math + 0.5·short, path=/data/of/mine/sums.parquet)",
        "three": "file(sums.parquet, reward=exact, path=/elsewhere/sums.parquet)",
        "four": "gsm8k",
        "five": "gsm8k",
    }


def test_a_label_is_no_part_of_a_cells_identity() -> None:
    assert cell({**SUMS, "label": "my sums"}).id == cell(SUMS).id


def test_reward_models_of_one_gold_reward_are_an_axis_and_not_tasks() -> None:
    gold = {"name": "strings", "length": 12}
    cells = {
        name: cell({"name": "proxy", "gold": gold, **settings})
        for name, settings in {
            "base": {"pairs": 512, "proxy_seed": None},
            "few": {"pairs": 128, "proxy_seed": None},
            "wide": {"pairs": 512, "hidden": 128},
        }.items()
    }
    assert len(set(task_labels(cells).values())) == 1
    axes, values = axis_table(cells)
    assert {axis.key: axis.values for axis in axes} == {
        "task.pairs": ("128", "512"),
        "task.hidden": ("32", "128"),
        "task.proxy_seed": ("0", "the cell's"),
    }
    assert group_labels(axes, values, "base")["few"] == "pairs 128"
    cells["other"] = cell({"name": "proxy", "gold": {**gold, "seed": 1}})
    assert len(set(task_labels(cells).values())) == 2, "another gold reward is another task"
