"""Bandits and tables: every word has its reward, and training finds the optimum that enumeration gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from klab.grid import load_grid
from klab.grid.errors import UserError
from klab.grid.schema.sections import load_section
from klab.harness.exact.tabular import enumerate_trajectories
from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.tasks import Example, load_task
from klab.tasks.bandit import Bandit
from klab.tasks.tabular import PROMPT, SHARE_OF_BEST, Tabular
from tests.support.small_cells import small_policy


def test_words_are_in_the_order_of_the_exact_lab() -> None:
    task = Tabular(symbols=3, horizon=2, rewards=range(9))
    spelled = ["".join("abc"[token] for token in row) for row in enumerate_trajectories(3, 2).tokens.tolist()]
    assert task.words == spelled
    assert [task.score(Example(PROMPT, ""), word).reward for word in spelled] == list(range(9))
    for other in ("", "a", "abc", "ad", "<end>"):
        assert task.score(Example(PROMPT, ""), other).reward == 0


def test_the_seed_draws_the_table() -> None:
    one, other = (load_task(load_section("task", {"name": "tabular", "seed": seed})) for seed in (0, 1))
    assert one.table == Tabular().table != other.table  # type: ignore[attr-defined]
    assert all(0 <= reward <= 1 for reward in Tabular(4, 3, 5).table.values())


def test_solutions_hold_the_best_word_often_enough_to_start_from() -> None:
    task = Bandit(arms=5, rewards=[0, 0, 1, 0, 0])
    solutions = [example.solution for example in task.split("train")]
    assert solutions.count("c") == SHARE_OF_BEST * len(solutions)
    assert set(solutions) == set("abcde")
    assert task.score(task.split("held_out")[0], "c").correct


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "bandit", "arms": 1}, "task.arms"),
        ({"name": "bandit", "arms": 3, "rewards": [1, 2]}, "2 rewards for a table of 3"),
        ({"name": "tabular", "symbols": 26, "horizon": 16}, "over the limit of 65536"),
        ({"name": "tabular", "rewards": [0.5, float("nan")]}, r"task\.rewards\.1.*finite"),
        ({"name": "tabular", "horizons": 2}, "did you mean 'horizon'"),
    ],
)
def test_wrong_tables(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_section("task", section)


def test_tasks_check_their_parameters_themselves() -> None:
    for wrong in (
        lambda: Bandit(27),
        lambda: Bandit(2, rewards=[1]),
        lambda: Tabular(2, 17),
        lambda: Tabular(1),
        lambda: Tabular(2, 0),
    ):
        with pytest.raises(UserError):
            wrong()


def word_probabilities(folder: Path) -> tuple[list[str], Tensor]:
    """Every first token of a checkpoint after the prompt, and its probability, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)).logits[0, -1].double()
    return [tokenizer.decode([token]) for token in range(len(logits))], logits.softmax(-1)


def test_training_reaches_the_exact_optimum_of_a_bandit(tmp_path: Path) -> None:
    """C23: with estimator k1 in the reward, E[R] − β·KL(π ‖ π₀) has the optimum π* ∝ π₀·exp(R/β)."""
    beta, rewards = 0.5, [0.0, 0.3, 0.6, 1.0]
    task = Bandit(rewards=rewards)
    start = small_policy(tmp_path / "start", str(task.alphabet))
    grid = {
        "name": "bandit",
        "task": {"name": "bandit", "rewards": rewards},
        "policy": {"name": "hf", "model": str(start)},
        "training": {
            "updates": 80,
            "prompts": 1,
            "group_size": 256,
            "lr": 0.02,
            "schedule": "linear",
            "evaluate_every": 80,
            "evaluation_prompts": 1,
            "evaluation_samples": 1,
            "checkpoint_updates": 80,
        },
        "objective": {
            "estimator": "k1",
            "placement": "reward",
            "beta": beta,
            "weight": "one",
            "advantage": "group_center",
            "aggregation": "sequence_sum",
            "kl_scale": "sum",
        },
    }
    file = tmp_path / "bandit.yaml"
    file.write_text(json.dumps(grid))
    run = Run.create(tmp_path / "run", load_grid(file))
    assert set(run_cells(run.path, run.cells).values()) == {"finished"}

    words, reference = word_probabilities(start)
    _, reached = word_probabilities(run.cell(run.cells[0]).policy)
    value = torch.tensor([task.table.get(word, 0.0) for word in words], dtype=torch.float64)
    optimum = (reference.log() + value / beta).softmax(-1)
    before, after = (0.5 * (each - optimum).abs().sum() for each in (reference, reached))
    assert before > 0.2
    assert after < 0.01
