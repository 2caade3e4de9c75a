"""Weights of 2025 and 2026 have the gradients of the losses that their sources print, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from klab.grid import Objective
from klab.harness.objective import LossCoefficients, TokenBatch, objective_loss, update_context
from klab.harness.objective.masking import masked_quantile

SHAPE = (6, 40)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def update(drift: float, seed: int = 0) -> TokenBatch:
    """Two groups of three trajectories of 40 tokens, with gaps between own ones."""
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    behaviour = -normal(*SHAPE).abs() - 0.01
    return TokenBatch(
        logp=(behaviour + drift * normal(*SHAPE)).clamp(max=-0.001),
        logp_behaviour=behaviour,
        logp_reference=behaviour,
        mask=torch.rand(*SHAPE, generator=noise) < 0.8,
        rewards=normal(6),
        groups=torch.tensor([0, 0, 0, 1, 1, 1]),
        max_new_tokens=SHAPE[1],
        logits=normal(*SHAPE, 5),
        logits_reference=normal(*SHAPE, 5),
    )


def ctpo(logp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    """Of one trajectory of own tokens: the dual-clipped surrogate on the ratio of the prefix, whose gradient goes
    through the token alone."""
    product = (logp - old).cumsum(0).detach() + logp - logp.detach()
    scale = torch.arange(1, len(logp) + 1).double().sqrt()
    plain = -a * product.exp()
    clipped = torch.maximum(plain, -a * product.clamp(-0.025 * scale, 0.05 * scale).exp())
    return torch.where(a < 0, torch.minimum(clipped, -a * (0.08 * scale).exp()), clipped)


def drpo(logp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    ratio = (logp - old).exp()
    return -a * ratio + a.abs() * old.exp() * (ratio - 1).square() / (2 * 0.3)


def ipo(logp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    kept = (logp.exp() - old.exp()).abs() <= 0.05
    return -a * kept * (logp - old).exp() + 0.2 * (logp - old).square()


def cppo(logp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    """Algorithm 1 of the paper, token by token."""
    moved, ratio = (logp.exp() - old.exp()).abs().detach(), (logp - old).exp()
    mean = float(torch.quantile(moved, 0.9).clamp(0.02, 0.04))
    terms, spent, weights = [], 0.0, 0.0
    for t in range(len(logp)):
        weight = 1 - 0.2 * t / max(len(logp) - 1, 1)
        limit = min(0.1, 0.1 + mean * weights - spent)
        kept = float(a[t] * (ratio[t].detach() - 1)) <= 0 or weight * float(moved[t]) <= limit
        terms.append(-a[t] * ratio[t] * kept)
        spent, weights = spent + weight * float(moved[t]), weights + weight
    return torch.stack(terms)


PRINTED: dict[str, tuple[dict[str, Any], Loss]] = {
    "CTPO": ({"ratio": "prefix_product", "weight": {"name": "log_clip", "log_ceiling": 0.08}}, ctpo),
    "DRPO": ({"weight": {"name": "drpo_tv", "tv_scale": 0.3}}, drpo),
    "CPPO": ({"weight": {"name": "cppo_tv", "tv_limit": 0.1}}, cppo),
    "prime-rl's ipo": ({"weight": {"name": "tv_band", "band": 0.05, "band_penalty": 0.2}}, ipo),
}


@pytest.mark.parametrize("drift", [0.01, 0.2])
@pytest.mark.parametrize("name", PRINTED)
def test_gradients_are_those_of_the_printed_losses(name: str, drift: float) -> None:
    values, printed = PRINTED[name]
    objective = Objective(placement="none", advantage="group_center", aggregation="token_mean", **values)
    batch = update(drift)
    leaf = batch.logp.clone().requires_grad_()
    out = objective_loss(objective, batch.replace(logp=leaf))
    ours = torch.autograd.grad(out.loss, leaf)[0]
    leaf = batch.logp.clone().requires_grad_()
    parts = [
        printed(leaf[n][own], batch.logp_behaviour[n][own], out.token_stats.advantage[n][own])
        for n, own in enumerate(batch.mask)
    ]
    theirs = torch.autograd.grad(torch.cat(parts).mean(), leaf)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    if drift == 0.2 and name != "DRPO":
        assert 0 < int((out.token_stats.weight[batch.mask] == 0).sum()) < int(batch.mask.sum())


def test_the_entropy_bonus_is_its_mean_with_the_loss_aggregation() -> None:
    batch = update(0.1)
    assert batch.logits is not None
    for aggregation in ("token_mean", "sequence_mean"):
        leaf = batch.logits.clone().requires_grad_()
        objective = Objective(placement="none", aggregation=aggregation, entropy_bonus=0.3)
        plain = Objective(placement="none", aggregation=aggregation)
        found = objective_loss(objective, batch.replace(logits=leaf)).loss - objective_loss(plain, batch).loss
        logp = leaf.log_softmax(-1)
        entropy = torch.where(batch.mask, -(logp.exp() * logp).sum(-1), 0.0)
        mean = entropy.sum() / batch.mask.sum()
        if aggregation == "sequence_mean":
            mean = (entropy.sum(1) / batch.mask.sum(1)).mean()
        torch.testing.assert_close(found, -0.3 * mean, rtol=1e-12, atol=0)
        for one, other in zip(torch.autograd.grad(found, leaf), torch.autograd.grad(-0.3 * mean, leaf), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_coefficients_of_the_update_take_the_place_of_the_objectives() -> None:
    batch, objective = update(0.1), Objective(entropy_bonus=0.3)

    def loss(bonus: float, coefficients: LossCoefficients) -> Tensor:
        chosen = Objective(entropy_bonus=bonus)
        return objective_loss(chosen, batch, update_context(chosen, batch, coefficients)).loss

    assert torch.equal(loss(0.3, LossCoefficients()), objective_loss(objective, batch).loss)
    assert torch.equal(loss(0.3, LossCoefficients(entropy=0.7)), loss(0.7, LossCoefficients()))
    assert torch.equal(loss(0.3, LossCoefficients(entropy=0.7, entropy_acts=False)), loss(0.0, LossCoefficients()))
    assert not torch.equal(loss(0.3, LossCoefficients()), loss(0.0, LossCoefficients()))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.37, 0.5, 0.999])
def test_the_tokens_of_high_entropy_are_those_of_the_update_whatever_it_is_cut_into(share: float) -> None:
    batch, objective = update(0.1), Objective(entropy_share=share, weight="ratio", placement="none")
    context = update_context(objective, batch)
    assert context.high_entropy is not None
    own = batch.token_entropy(batch.mask)
    assert own is not None
    bound = torch.quantile(own[batch.mask], 1 - share)
    assert torch.equal(context.high_entropy, batch.mask & (own >= bound))
    kept = int(context.high_entropy.sum())
    assert abs(kept - share * int(batch.mask.sum())) <= 1
    leaf = batch.logp.clone().requires_grad_()
    moved = torch.autograd.grad(objective_loss(objective, batch.replace(logp=leaf)).loss, leaf)[0] != 0
    assert torch.equal(moved, context.high_entropy)


def test_quantiles_are_torchs() -> None:
    noise = torch.Generator().manual_seed(3)
    values = torch.randn(50, 9, generator=noise, dtype=torch.float64)
    mask = torch.rand(50, 9, generator=noise) < 0.6
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        found = masked_quantile(values, mask, share)[:, 0]
        for row, own, quantile in zip(values, mask, found, strict=True):
            assert float(quantile) == (float(torch.quantile(row[own], share)) if own.any() else float("inf"))


def test_clip_cov_draws_as_many_tokens_as_it_says_and_others_in_another_update() -> None:
    weight = {"name": "clip_cov", "cov_low": -10.0, "cov_high": 10.0, "cov_share": 0.1, "eps_low": 1.0, "eps_high": 9.0}
    batch, objective = update(0.1), Objective(weight=weight, placement="none")
    drawn = [update_context(objective, batch, update=number).solved["dropped"] for number in (0, 0, 1, 2)]
    assert [int(each.sum()) for each in drawn] == [int(0.1 * int(batch.mask.sum()))] * 4
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    times = (
        torch.stack([update_context(objective, batch, update=number).solved["dropped"] for number in range(400)])
        .double()
        .mean(0)[batch.mask]
    )
    spread = (0.1 * 0.9 / 400) ** 0.5
    assert float((times - 0.1).abs().max()) < 5 * spread


def test_without_entropy_and_logits_the_message_says_what_is_missing() -> None:
    bare = update(0.1).replace(logits=None, logits_reference=None)
    for terms in ({"entropy_bonus": 0.1}, {"entropy_share": 0.5}):
        with pytest.raises(ValueError, match="needs entropy"):
            objective_loss(Objective(**terms), bare)
