"""KL estimators: values, gradients, and the exact conditional KL."""

from __future__ import annotations

import math

import pytest
import torch

from klab.grid import Objective
from klab.harness.objective import objective_loss
from klab.harness.objective.kl import ESTIMATORS
from tests.support.random_batches import gradient, tokens

KAPPA = torch.tensor([-1.5, -1e-9, 0.0, 1e-9, 0.3, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [
        ("k1", lambda k: k, lambda k: 1.0),
        ("k2", lambda k: k * k / 2, lambda k: k),
        ("k3", lambda k: math.expm1(-k) + k, lambda k: -math.expm1(-k)),
        ("abs", abs, lambda k: (k > 0) - (k < 0)),
        ("k3_plus", lambda k: math.expm1(-k) + k, lambda k: k),
    ],
)
def test_value_and_gradient(name: str, value, slope) -> None:
    kappa = KAPPA.clone().requires_grad_()
    phi = ESTIMATORS[name](kappa)
    assert phi.tolist() == [pytest.approx(value(k), rel=1e-12) for k in KAPPA.tolist()]
    (derivative,) = torch.autograd.grad(phi.sum(), kappa)
    assert derivative.tolist() == [pytest.approx(slope(k), rel=1e-12) for k in KAPPA.tolist()]


def test_k3_plus_has_exactly_the_value_of_k3() -> None:
    assert torch.equal(ESTIMATORS["k3_plus"](KAPPA), ESTIMATORS["k3"](KAPPA))


def test_full_is_the_kl_of_the_two_distributions_with_its_gradient() -> None:
    logits = torch.tensor([[[0.3, -1.0, 2.0]]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[[1.0, 0.5, -0.2]]], dtype=torch.float64)
    p, q = logits.detach().softmax(-1), other.softmax(-1)
    divergence = (p * (p / q).log()).sum()
    phi = ESTIMATORS["full"](None, logits=logits, logits_reference=other)
    torch.testing.assert_close(phi.detach(), divergence.view(1, 1))
    (derivative,) = torch.autograd.grad(phi.sum(), logits)
    torch.testing.assert_close(derivative, p * ((p / q).log() - divergence))


def test_full_ignores_symbols_that_the_policy_excludes() -> None:
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]], dtype=torch.float64, requires_grad=True)
    excluded_by_both = torch.tensor([[[1.0, 1.0, -math.inf]]], dtype=torch.float64)
    phi = ESTIMATORS["full"](None, logits=logits, logits_reference=excluded_by_both)
    assert phi.tolist() == [[0.0]]
    assert torch.autograd.grad(phi.sum(), logits)[0].isfinite().all()
    support_missing = torch.tensor([[[1.0, -math.inf, 1.0]]], dtype=torch.float64)
    assert ESTIMATORS["full"](None, logits=logits, logits_reference=support_missing).tolist() == [[math.inf]]


def test_full_in_a_detached_placement_is_taken_at_the_current_policy() -> None:
    logits = torch.tensor([[[0.3, -1.0]]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[[0.0, 0.5]]], dtype=torch.float64)
    batch = tokens([[-0.5]], behaviour=[[-3.0]], logits=logits, logits_reference=reference)
    settings = {"estimator": "full", "placement": "advantage", "advantage": "raw", "beta": 1.0, "weight": "one"}
    divergence = float(ESTIMATORS["full"](None, logits=logits, logits_reference=reference).detach())
    for kl_at in ("rollout", "current"):
        out = objective_loss(Objective(kl_at=kl_at, **settings), batch)
        out.loss.backward()
        assert float(batch.logp.grad) == pytest.approx(-(1 - divergence))  # type: ignore[arg-type]
        assert logits.grad is None
        batch.logp.grad = None


def test_full_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="needs logits, which the batch does not have"):
        gradient(Objective(estimator="full"), tokens([[0.0]]))


def test_overflow_shows_as_not_finite() -> None:
    batch = tokens([[0.0]], behaviour=[[-2000.0]], reference=[[-1.0]])
    out = objective_loss(Objective(placement="none", weight="ratio", advantage="raw"), batch)
    out.loss.backward()
    assert not batch.logp.grad.isfinite().any()  # type: ignore[union-attr]
    far = tokens([[-2000.0]], reference=[[0.0]])
    assert not objective_loss(Objective(estimator="k3", advantage="raw"), far).loss.isfinite()
