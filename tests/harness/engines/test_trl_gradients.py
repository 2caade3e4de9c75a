"""On TRL an update has the gradient of klab's objective, for every combination of the axes that is supported."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from klab.grid import UserError
from klab.grid.catalogue import AXES
from klab.harness.engines.trl.cell import reset_accelerate
from klab.harness.engines.trl.trainer import KlabTrainer
from tests.support.letters_task import LETTERS
from tests.support.random_batches import random_objective
from tests.support.random_checkpoints import checkpoint
from tests.support.small_cells import small_policy
from tests.support.trl_cells import (
    draw_rollout,
    drift,
    plain_gradient,
    trainer_of,
    trl_cell,
    trl_gradient,
    with_objective,
)

COMBINATIONS = 200
MakeTrainer = Callable[..., KlabTrainer]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def make(policy: Path, tmp_path: Path) -> Iterator[MakeTrainer]:
    def of(objective: dict[str, Any] | None = None, **training: Any) -> KlabTrainer:
        return trainer_of(trl_cell(policy, objective, **training), policy, tmp_path)

    yield of
    reset_accelerate()


def assert_same_gradient(trainer: KlabTrainer, policy: Path, what: object, limit: float = 1e-9) -> None:
    mine, theirs = trl_gradient(trainer), plain_gradient(trainer, policy)
    assert torch.isfinite(theirs).all(), what
    error = float((mine - theirs).norm()) / max(float(theirs.norm()), 1e-12)
    assert error < limit, (what, error)


@pytest.mark.parametrize("family", ["GPT2", "Gemma", "OPT"])
def test_models_are_trained_as_klab_trains_them(tmp_path: Path, family: str) -> None:
    """GPT-2 and OPT learn positions, which padding must not shift; policies generate Gemma's padding token, whose
    embedding learns; OPT drops out without modules of dropout."""
    policy = checkpoint(tmp_path / family, family, LETTERS)
    trainer = trainer_of(trl_cell(policy, task="Ragged", prompts=8), policy, tmp_path)
    draw_rollout(trainer)
    assert len({len(prompt) for prompt in trainer.experience.rollout.prompts}) > 1
    # angles of rotary positions are float32 whatever the precision, and padding shifts them
    assert_same_gradient(trainer, policy, family, 1e-6 if family == "Gemma" else 1e-9)
    reset_accelerate()


@pytest.mark.parametrize("steps", [1, 2], ids=["on-policy", "off-policy"])
def test_random_combinations_have_the_gradient_of_the_objective(make: MakeTrainer, policy: Path, steps: int) -> None:
    trainer = make({"placement": "reward", "advantage": "greedy_baseline"}, updates_per_rollout=steps, micro_batch=5)
    assert trainer.current_gradient_accumulation_steps == 3
    draw_rollout(trainer)
    if steps == 2:
        drift(trainer, 2)
    source = random.Random(steps)
    supported = [name for name, value in AXES["advantage"].values.items() if "logits" not in value.needs]
    for _ in range(COMBINATIONS // 2):
        objective = random_objective(source, advantage=source.choice(supported))
        while objective.entropy_share < 1.0:  # refused: TRL keeps no entropies of the whole update
            objective = random_objective(source, advantage=source.choice(supported))
        with_objective(trainer, objective)
        assert_same_gradient(trainer, policy, objective)


def test_an_entropy_bonus_has_its_gradient_through_trls_own_head(tmp_path: Path, policy: Path) -> None:
    """In float32, where log-probabilities and entropies are TRL's."""
    cell = trl_cell(policy, {"placement": "none", "advantage": "raw", "entropy_bonus": 0.5}, dtype="float32")
    trainer = trainer_of(cell, policy, tmp_path)
    draw_rollout(trainer)
    assert_same_gradient(trainer, policy, "entropy bonus", 1e-5)
    reset_accelerate()


def test_a_share_of_the_tokens_of_the_whole_update_is_refused(policy: Path) -> None:
    with pytest.raises(UserError, match="TRL keeps no entropies of the whole update"):
        trl_cell(policy, {"entropy_share": 0.2})


def test_an_advantage_on_logits_of_the_whole_update_is_refused(policy: Path) -> None:
    with pytest.raises(UserError, match="TRL keeps no logits of the whole update"):
        trl_cell(policy, {"advantage": "optimal_token_baseline"})
