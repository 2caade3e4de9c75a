"""What must not matter: padding, environment tokens, the order of trajectories, how an update is cut or mapped."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from klab.grid import Objective
from klab.grid.catalogue import AXES
from klab.harness.objective import TokenBatch, loss_terms, objective_loss, update_context
from tests.support.random_batches import gradient, random_batch, random_objective, tokens

PER_TOKEN = ("logp", "logp_behaviour", "logp_reference", "logits", "logits_reference", "values")


def _gradients(objective: Objective, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    assert batch.logits is not None
    leaves = (batch.logp.detach().requires_grad_(), batch.logits.detach().requires_grad_())
    loss = objective_loss(objective, batch.replace(logp=leaves[0], logits=leaves[1])).loss
    logp, logits = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return logp, logits


@pytest.mark.parametrize("seed", range(40))
def test_other_tokens_never_change_a_bit_and_get_no_gradient(seed: int) -> None:
    objective = random_objective(random.Random(seed))
    clean, nan, huge = (random_batch(random.Random(seed), garbage=g) for g in (0.0, float("nan"), -1e30))
    expected = _gradients(objective, clean)
    for batch in (nan, huge):
        assert all(torch.equal(a, b) for a, b in zip(_gradients(objective, batch), expected, strict=True))
    for found in expected:
        assert not found[~clean.mask].any()


@pytest.mark.parametrize("seed", range(40))
def test_extra_padding_does_not_matter(seed: int) -> None:
    source = random.Random(seed)
    objective, batch = random_objective(source), random_batch(source, garbage=0.0)
    columns = sorted(source.sample(range(batch.mask.shape[1] + 3), batch.mask.shape[1]))

    def widened(values: Tensor) -> Tensor:
        room = torch.zeros(len(values), values.shape[1] + 3, *values.shape[2:], dtype=values.dtype)
        room[:, columns] = values.detach()
        return room

    changes = {name: getattr(batch, name) for name in (*PER_TOKEN, "mask")}
    wide = batch.replace(**{name: widened(value) for name, value in changes.items() if value is not None})
    for narrow_gradient, wide_gradient in zip(_gradients(objective, batch), _gradients(objective, wide), strict=True):
        torch.testing.assert_close(wide_gradient[:, columns], narrow_gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed", range(40))
def test_the_order_of_trajectories_does_not_matter(seed: int) -> None:
    """Except to Clip-Cov, which draws tokens by their numbers, and to which of equal covariances KL-Cov penalises."""
    source = random.Random(seed)
    drawn = (random_objective(source) for _ in range(100))
    objective = next(each for each in drawn if each.weight not in ("clip_cov", "kl_cov"))
    batch = random_batch(source)
    order = torch.tensor(source.sample(range(len(batch.rewards)), len(batch.rewards)))
    for before, after in zip(_gradients(objective, batch), _gradients(objective, batch.rows(order)), strict=True):
        torch.testing.assert_close(after, before[order], rtol=1e-11, atol=1e-13)


def test_an_update_without_own_tokens_has_a_loss_of_zero() -> None:
    empty = tokens([[0.0, 0.0]] * 4, mask=[[False, False]] * 4)
    for axis in AXES:
        for value in AXES[axis].values:
            if value not in ("full", "greedy_baseline", "optimal_token_baseline"):
                out = objective_loss(Objective(**{axis: value}), empty)
                assert float(out.loss.detach()) == 0.0
                assert set(out.metrics.values()) == {0.0}
                assert not gradient(Objective(**{axis: value}), empty).any()


def test_micro_batches_in_slices_add_up() -> None:
    source = random.Random(1)
    objective = Objective(weight="adaptive", advantage="batch_norm", aggregation="token_mean", beta=0.3)
    batch = random_batch(source, drift=0.5)
    context = update_context(objective, batch)
    whole = objective_loss(objective, batch).loss
    parts = [slice(0, 2), slice(2, None)]
    total = sum(objective_loss(objective, batch.rows(rows), context.rows(rows)).loss for rows in parts)
    torch.testing.assert_close(total, whole, rtol=1e-13, atol=0)
    alone = sum(objective_loss(objective, batch.rows(rows)).loss for rows in parts)
    assert not torch.allclose(alone, whole)  # type: ignore[arg-type]


def _updates(seed: int, number: int = 5) -> dict[str, Tensor]:
    """Several updates of 6 trajectories and 4 columns as `[U, 6, …]`."""
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(number, 6, *shape, generator=noise, dtype=torch.float64)

    behaviour = -normal(4).abs()
    return {
        "logp": behaviour + 0.3 * normal(4),
        "logp_behaviour": behaviour,
        "logp_reference": behaviour + 0.3 * normal(4),
        "mask": normal(4) > -0.8,
        "rewards": (normal() > 0).double(),
        "logits": normal(4, 3),
        "logits_reference": normal(4, 3),
        "greedy_rewards": normal(),
        "values": normal(4),
        "groups": torch.stack([torch.randperm(6, generator=noise) // 3 for _ in range(number)]),
    }


@pytest.mark.parametrize(("axis", "value"), [(axis, value) for axis in AXES for value in AXES[axis].values])
def test_updates_mapped_at_once_equal_a_loop(axis: str, value: str) -> None:
    objective = random_objective(random.Random(f"{axis} {value}"), **{axis: value})
    updates = _updates(7)
    shared = updates["groups"][0]

    def loss(fields: dict[str, Tensor], groups: Tensor, n_groups: int | None) -> Tensor:
        batch = TokenBatch(**fields, groups=groups, max_new_tokens=9, n_groups=n_groups)  # type: ignore[arg-type]
        terms = loss_terms(objective, batch, update_context(objective, batch))
        return torch.stack(terms).sum()

    def derivative(fields: dict[str, Tensor], groups: Tensor, n_groups: int | None) -> Any:
        leaves = {name: fields[name] for name in ("logp", "logits")}
        return grad(lambda moved: loss({**fields, **moved}, groups, n_groups))(leaves)

    fields = {name: tensor for name, tensor in updates.items() if name != "groups"}
    one_grouping = vmap(lambda each: derivative(each, shared, None))(fields)
    own_groupings = vmap(lambda each, groups: derivative(each, groups, 2))(fields, updates["groups"])
    for u in range(5):
        each = {name: tensor[u] for name, tensor in fields.items()}
        for mapped, groups in ((one_grouping, shared), (own_groupings, updates["groups"][u])):
            batch = TokenBatch(**each, groups=groups, max_new_tokens=9)  # type: ignore[arg-type]
            wanted = _gradients(objective, batch)
            torch.testing.assert_close(mapped["logp"][u], wanted[0], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(mapped["logits"][u], wanted[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed", range(20))
def test_single_precision_stays_single_and_close(seed: int) -> None:
    source = random.Random(seed)
    objective, batch = random_objective(source, weight="power"), random_batch(source, garbage=0.0)
    single = batch.replace(
        **{name: value.detach().float() for name, value in vars(batch).items() if torch.is_tensor(value) and
        value.is_floating_point()}
    )  # fmt: skip
    out = objective_loss(objective, single)
    assert out.loss.dtype == torch.float32
    got, wanted = gradient(objective, single), gradient(objective, batch)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-4)
