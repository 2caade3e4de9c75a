"""reasoning-gym as a task: streams that share nothing, its own scores, its names in messages, the same problems."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from typing import Any

import pytest

from klab.grid import UserError, user_code
from klab.tasks import load_task
from klab.tasks.reasoning import LONGEST_TEXT, Reasoning

WORD_ORDER = "word_ladder"
"""A dataset that draws from sets, whose order Python changes from process to process."""


def task(**settings: Any) -> Reasoning:
    made = load_task({"name": "reasoning_gym", "size": 40, "held_out": 10, **settings})
    assert isinstance(made, Reasoning)
    return made


def test_streams_share_neither_seeds_nor_prompts() -> None:
    made = task(dataset="chain_sum", size=600, held_out=100, parameters={"max_terms": 2, "max_digits": 1})
    train, held_out = made.split("train"), made.split("held_out")
    asked = [example.prompt for example in held_out]
    assert len(set(asked)) == len(asked)
    assert not set(asked) & {example.prompt for example in train}
    assert len(train) < 600, "some of what was generated had to be left out"
    seeds = [{sum(example.columns["problem"]) for example in split} for split in (train, held_out)]
    other = task(dataset="chain_sum", seed=1)
    seeds += [{sum(example.columns["problem"]) for example in other.split(name)} for name in ("train", "held_out")]
    assert sum(map(len, seeds)) == len(set().union(*seeds))


def test_scores_are_the_datasets_own() -> None:
    import reasoning_gym

    made = task(dataset="chain_sum", prompt="{expression} =")
    example = made.split("train")[0]
    entry = {"answer": example.answer}
    own = reasoning_gym.get_score_answer_fn("chain_sum")
    answers = [example.answer, f"{example.answer}.0", f"{example.answer} or so", "", "seven", "9" * 400]
    scores = list(made.score_all([example] * len(answers), answers))
    assert [score.reward for score in scores] == [own(answer, entry) for answer in answers]
    assert [score.correct for score in scores] == [True, True, False, False, False, False]
    assert example.prompt.endswith(" =")
    assert 0 < scores[2].reward < 1


@pytest.mark.parametrize(
    "text",
    ["<answer>3</answer>", "1 <answer> 2\n</answer> <answer>\n 3</answer> 4", "none", "<answer>3", "<answer></answer>"],
)
def test_tagged_answers_are_found_as_reasoning_gym_finds_them(text: str) -> None:
    from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer

    made = task(dataset="chain_sum", answer="tags", size=3, held_out=2)
    assert made.answer_of(text) == extract_answer(text)
    example = made.split("train")[0]
    assert example.prompt.startswith(SYSTEM_PROMPTS["default"])
    assert made.score(example, f"well: {example.solution}").correct
    assert made.score(example, example.answer).reward == 0.0


def test_a_scorer_that_does_not_end_is_worth_nothing_and_is_counted() -> None:
    made = task(dataset="polynomial_multiplication", size=4, held_out=2, reward_seconds=1.5)
    example = made.split("train")[0]
    scores = list(made.score_all([example] * 2, ["9**9**9**9*x", example.solution]))
    assert [(score.reward, score.timeouts) for score in scores] == [(0.0, 1), (1.0, 0)]
    assert made.score(example, "((((").reward == 0.0


def test_problems_do_not_depend_on_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in (1, 2):  # the limit of memory differs, hence the process
        monkeypatch.setenv("PYTHONHASHSEED", str(seed))
        made = task(dataset=WORD_ORDER, size=12, held_out=1 + seed, reward_memory_gb=7 + seed)
        found.append([example.prompt + example.answer for example in made.split("train")])
    assert len(set(map(str, found))) == 1


def test_composites_and_curricula() -> None:
    parts = [{"dataset": "chain_sum", "weight": 3.0, "level": 0}, {"dataset": "gcd", "parameters": {"max_value": 9}}]
    both = task(datasets=parts, size=200)
    names = [example.columns["source_dataset"] for example in both.split("train")]
    assert 0.6 < names.count("chain_sum") / len(names) < 0.9
    assert all(both.score(example, example.solution).correct for example in both.split("train")[:20])
    terms = {}
    for level in (0, 3, {"num_digits": 2}):
        made = task(dataset="chain_sum", level=level, size=100)
        terms[str(level)] = max(example.columns["num_terms"] for example in made.split("train"))
    assert terms == {"0": 2, "3": 5, "{'num_digits': 2}": 2}
    small = task(dataset="chain_sum", level=3, parameters={"max_terms": 2}, size=50)
    assert {example.columns["num_terms"] for example in small.split("train")} == {2}


def test_small_texts_make_an_alphabet_and_large_ones_say_why_not() -> None:
    small = task(dataset="spell_backward", prompt="{word}>")
    assert small.alphabet is not None
    assert set("".join(each.prompt + each.solution for each in small.split("train"))) <= set(small.alphabet)
    assert small.max_new_tokens == 1 + max(
        len(each.answer) for name in ("train", "held_out") for each in small.split(name)
    )
    assert "different characters" in str(task(dataset="emoji_mystery").no_alphabet)
    assert f"of at most {LONGEST_TEXT}" in str(task(dataset="tower_of_hanoi", size=4, held_out=2).no_alphabet)
    assert "without an answer" in str(task(dataset="propositional_logic", size=4, held_out=2).no_alphabet)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dataset": "chain_sums"}, r"task\.dataset: unknown dataset \(got 'chain_sums'\); did you mean 'chain_sum'"),
        ({"dataset": "chain_sum", "parameters": {"max_term": 3}}, r"parameter of chain_sum.* did you mean 'max_terms'"),
        (
            {"dataset": "chain_sum", "parameters": {"max_terms": 1}},
            r"task\.parameters: .*max_terms must be >= min_terms",
        ),
        ({"dataset": "chain_sum", "parameters": {"max_terms": 2.5}}, r"task\.parameters: .*cannot be made"),
        ({"dataset": "chain_sum", "parameters": {"size": 3}}, r"Write it as task\.size"),
        ({"dataset": "chain_sum", "level": 99}, r"task\.level: the highest level of chain_sum is 10"),
        ({"dataset": "chain_sum", "level": {"num_term": 1}}, r"task\.level.*did you mean 'num_terms'"),
        ({"dataset": "chain_sum", "level": {"num_terms": 77}}, r"task\.level\.num_terms: .*from 0 to 10"),
        (
            {"datasets": [{"dataset": "gcd", "parameters": {"x": 1}}, {"dataset": "lcm"}]},
            r"task\.datasets\.0\.parameters",
        ),
        ({"dataset": "chain_sum", "prompt": "{expresion}"}, r"task\.prompt: .*did you mean 'expression'"),
        ({"dataset": "chain_sum", "instruction": "defalt"}, r"task\.instruction: .*did you mean 'default'"),
        ({"dataset": "count_bits", "parameters": {"min_n": 7, "max_n": 7}}, r"task\.held_out: the 1 prompts"),
    ],
)
def test_mistakes_name_the_nearest_valid_one(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        task(**settings).split("train")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from klab.tasks import packages

    with pytest.raises(UserError, match=r"needs reasoning-gymnasium.*pip install 'klab\[reasoning\]'"):
        packages.require_package("reasoning-gymnasium", "reasoning", "task.name", "reasoning_gym")


def test_the_tasks_own_process_does_not_load_the_library() -> None:
    code = (
        "import sys; from klab.tasks import load_task; "
        "task = load_task({'name': 'reasoning_gym', 'dataset': 'gcd', 'size': 2, 'held_out': 1}); "
        "assert task.split('train')[0].answer; assert 'reasoning_gym' not in sys.modules"
    )
    assert importlib.util.find_spec("reasoning_gym") is not None
    subprocess.run(user_code.python_command("-c", code), check=True, env={**os.environ, "PYTHONHASHSEED": "5"})
