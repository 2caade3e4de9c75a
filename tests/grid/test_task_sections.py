"""Task sections: every task has one, rewards may be written short, and spellings of one reward are one cell."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from klab.grid import Cell, UserError, parse_grid
from klab.grid.schema.sections import TASKS, load_section
from klab.tasks.task import TASKS as LOADED

GSM8K = {"name": "gsm8k", "reward": "math"}
NEEDED: dict[str, dict[str, Any]] = {
    "file": {"path": "data.jsonl", "prompt": "q"},
    "trl_environment": {"path": "data.jsonl", "prompt": "q", "environment": "./counter.py:Counter"},
    "proxy": {"gold": "addition"},
    "reasoning_gym": {"dataset": "chain_sum", "parameters": {"max_terms": 3}, "level": {"num_digits": 1}},
    "verifiers": {"environment": "my-sums", "arguments": {"count": 3}},
}


def cell(task: dict[str, Any]) -> Cell:
    return parse_grid(yaml.safe_dump({"name": "study", "task": task}), "study.yaml").cells[0]


def test_every_section_has_its_task() -> None:
    assert set(TASKS) == set(LOADED)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_sections_survive_the_manifest(name: str) -> None:
    section = load_section("task", {"name": name, **NEEDED.get(name, {})})
    assert load_section("task", section.model_dump(mode="json")) == section
    made = cell({"name": name, **NEEDED.get(name, {})})
    assert Cell.from_resolved(made.resolved()) == made


def test_a_later_setting_at_its_default_leaves_ids_as_they_were() -> None:
    assert cell({"name": "addition"}).group == "k3-loss-group_norm-dd817104"
    assert cell({"name": "addition", "prompt_order": "most"}).group == "k3-loss-group_norm-dd817104"
    assert cell({"name": "addition", "prompt_order": "least"}).group != "k3-loss-group_norm-dd817104"


def test_spellings_of_one_reward_are_one_cell() -> None:
    spellings: list[Any] = [
        "math",
        ["math"],
        {"name": "math", "weight": 1},
        [{"name": "math", "weight": 1.0, "model": None}],
    ]
    assert len({cell({"name": "gsm8k", "reward": spelling}).id for spelling in spellings}) == 1
    assert cell({"name": "gsm8k", "reward": {"name": "math", "weight": 2}}).id != cell(GSM8K).id


def test_the_time_limit_is_no_part_of_a_cells_identity() -> None:
    assert cell({**GSM8K, "reward_seconds": 1.0}).id == cell(GSM8K).id


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "gsm8k", "reward": "maths"}, r"task\.reward: unknown reward \(got 'maths'\); did you mean 'math'"),
        ({"name": "gsm8k", "reward": {"nme": "math"}}, r"task\.reward: unknown key \(got 'nme'\); did you mean 'name'"),
        ({"name": "gsm8k", "reward": {"name": "math", "weight": "much"}}, r"task\.reward\.0\.weight"),
        ({"name": "gsm8k", "reward": []}, r"task\.reward: a reward needs at least one term"),
        ({"name": "gsm8k", "reward": {"model": "m", "name": "math"}}, "either a name or a model"),
        ({"name": "gsm8k", "rewards": "math"}, "did you mean 'reward'"),
        ({"name": "gsm8k", "reward_seconds": 0}, r"task\.reward_seconds"),
        ({"name": "file", "path": "data.jsonl"}, r"task\.prompt: missing"),
        ({"name": "calculator", "digits": 1}, r"task\.digits"),
        ({"name": "verifiers", "environment": "my sums"}, r"task\.environment: names no environment"),
        ({"name": "verifiers", "environment": "sums", "response": "{content}"}, r"task\.response: needs a beginning"),
        ({"name": "verifiers", "environment": "sums", "argument": {}}, "did you mean 'arguments'"),
        ({"name": "gsm"}, "did you mean 'gsm8k'"),
    ],
)
def test_mistakes_are_named(task: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_section("task", task)


def test_spellings_of_one_environment_are_one_cell() -> None:
    spellings = ["someone/my-sums", "my-sums", "my_sums", "my_sums:load_environment"]
    assert len({cell({"name": "verifiers", "environment": each}).id for each in spellings}) == 1
    assert (
        cell({"name": "verifiers", "environment": "./my_sums.py:load_environment"}).id
        != cell({"name": "verifiers", "environment": "my_sums"}).id
    )


def test_a_term_as_it_was_before_messages_keeps_its_id() -> None:
    term = cell({"name": "gsm8k", "reward": "my.rewards:score"}).task.model_dump(mode="json")["reward"][0]
    assert set(term) == {"name", "model", "weight"}
    spoken = {"name": "my.rewards:score", "messages": True}
    made = cell({"name": "gsm8k", "reward": spoken})
    assert Cell.from_resolved(made.resolved()) == made
    assert made.id != cell({"name": "gsm8k", "reward": "my.rewards:score"}).id


def test_the_name_of_a_terms_part_is_written_only_where_it_is_given() -> None:
    named = cell({"name": "gsm8k", "reward": ["math", {"name": "exact", "weight": 0.0, "part": "gold"}]})
    written = named.task.model_dump(mode="json")["reward"]
    assert ["part" in term for term in written] == [False, True]
    assert Cell.from_resolved(named.resolved()) == named
    with pytest.raises(UserError, match=r"task\.reward\.0\.part"):
        cell({"name": "gsm8k", "reward": {"name": "math", "part": "a b"}})


def test_a_reward_model_takes_the_cells_seed_where_none_is_given() -> None:
    given, own = (cell({"name": "proxy", "gold": "strings", "proxy_seed": seed}).task for seed in (3, None))
    assert [task.of_cell(7).proxy_seed for task in (given, own)] == [3, 7]
