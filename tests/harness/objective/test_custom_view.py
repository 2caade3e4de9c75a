"""Custom functions see what an update knows by the names of their parameters, whole or cut into micro-batches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from klab.grid import Objective, UserError
from klab.grid.custom_values import SOLVER, VIEW
from klab.harness.objective import TokenBatch, axis_functions, objective_loss, update_context
from klab.harness.objective.masking import lengths
from tests.support.random_batches import gradient, random_batch

HERE = "tests.support.custom_values"


def _batch(seed: int) -> TokenBatch:
    batch = random_batch(random.Random(seed), drift=0.3)
    noise = torch.Generator().manual_seed(seed)
    spread = torch.rand(batch.mask.shape, generator=noise, dtype=torch.float64)
    return batch.replace(entropy=torch.where(batch.mask, spread, float("nan")))


def _whole_and_in_pieces(objective: Objective, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    context = update_context(objective, batch, update=4)
    whole = objective_loss(objective, batch, context)
    pieces = [objective_loss(objective, batch.rows(r), context.rows(r)) for r in (slice(0, 2), slice(2, None))]
    return whole.loss.detach(), sum(piece.loss for piece in pieces).detach()


@pytest.mark.parametrize(
    ("custom", "built_in"),
    [
        ({"weight": f"{HERE}:dppo"}, {"weight": "dppo_tv"}),
        (
            {"weight": {"name": f"{HERE}:dppo", "width": 0.02}},
            {"weight": {"name": "dppo_tv", "tv_low": 0.02, "tv_high": 0.02}},
        ),
        ({"advantage": f"{HERE}:gdpo"}, {"advantage": "term_norm"}),
    ],
)
def test_published_methods_written_with_the_documented_names_are_the_built_in_ones_to_the_bit(
    custom: dict[str, Any], built_in: dict[str, Any]
) -> None:
    for seed in range(20):
        batch = _batch(seed)
        assert torch.equal(gradient(Objective(**custom), batch), gradient(Objective(**built_in), batch)), seed


def test_every_name_of_a_weight_is_given_what_the_table_says() -> None:
    objective = Objective(weight=f"{HERE}:everything", advantage="raw", placement="none")
    batch = next(batch for batch in map(_batch, range(50)) if batch.reward_terms is not None and len(batch.mask) > 3)
    asked = axis_functions(objective).needs
    assert asked == set(VIEW) - {"ratio", "advantage", "groups", "values", "logits", "logits_reference"}
    weight = objective_loss(objective, batch, update_context(objective, batch, update=4)).token_stats.weight
    own = batch.mask
    position = (own.cumsum(1) - 1)[own]
    by_token = (
        batch.logp.detach() + batch.logp_behaviour + batch.logp_reference + batch.logp.detach() - batch.logp_behaviour
    )
    assert batch.entropy is not None
    assert batch.reward_terms is not None
    assert batch.greedy_rewards is not None
    terms = (batch.reward_terms.nan_to_num() * torch.tensor(batch.term_weights, dtype=torch.float64)).sum(1)
    by_row = batch.rewards + batch.greedy_rewards + terms + lengths(own)[:, 0] + 1 + 4
    expected = (by_token + batch.entropy + by_row[:, None])[own] + position
    torch.testing.assert_close(weight[own], expected, rtol=1e-12, atol=1e-12)
    whole, pieces = _whole_and_in_pieces(objective, batch)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)


def test_a_solver_sees_the_whole_update_and_divides_the_parameters_with_its_weight() -> None:
    objective = Objective(weight={"name": f"{HERE}:above_the_middle", "share": 0.75, "strength": 3.0}, placement="none")
    batch = _batch(5)
    context = update_context(objective, batch)
    log_ratio = (batch.logp.detach() - batch.logp_behaviour)[batch.mask]
    assert float(context.solved["middle"]) == pytest.approx(float(log_ratio.quantile(0.75).exp()), rel=1e-12)
    whole, pieces = _whole_and_in_pieces(objective, batch)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    weights = objective_loss(objective, batch).token_stats.weight[batch.mask]
    assert set(weights.tolist()) == {1.0, 3.0}


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            {"name": f"{HERE}:above_the_middle", "share": 0.5, "strenght": 2.0},
            "neither .* has such a parameter.*strength",
        ),
        ({"name": f"{HERE}:dppo", "logp": 1.0}, r"no such parameter.*logp"),
    ],
)
def test_mistakes_are_named(weight: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        axis_functions(Objective(weight=weight))


def test_what_the_batch_lacks_is_named() -> None:
    batch = random_batch(random.Random(3)).replace(logits=None, logits_reference=None)
    with pytest.raises(ValueError, match="needs entropy, which the batch does not have"):
        objective_loss(Objective(weight=f"{HERE}:everything"), batch)


def test_the_example_of_a_solver_runs_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "klab_example_of_solver.py").write_text(SOLVER.example)
    monkeypatch.syspath_prepend(tmp_path)
    objective = Objective(weight="klab_example_of_solver:relative", advantage="raw", placement="none")
    weights = objective_loss(objective, _batch(7)).token_stats.weight[_batch(7).mask]
    assert float(weights.max()) == 1.0
