"""The divergence axis: values, gradients, limits, and distributions that exclude symbols."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from klab.grid import Objective, UserError
from klab.harness.objective import objective_loss
from klab.harness.objective.divergence import DIVERGENCES, Divergence
from klab.harness.objective.functions import divergence_of
from klab.harness.objective.kl import ESTIMATORS
from tests.support.random_batches import tokens

EVERY: dict[str, dict[str, Any]] = {
    "reverse": {"divergence": "reverse"},
    "forward": {"divergence": "forward"},
    "jeffreys": {"divergence": "jeffreys"},
    "alpha ½": {"divergence": "alpha"},
    "alpha 2": {"divergence": {"name": "alpha", "alpha": 2}},
}
LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([1.0, 0.5, -0.2, 0.0], dtype=torch.float64)


def made(name: str) -> Divergence:
    return divergence_of(Objective(estimator="k1", **EVERY[name]))


def by_hand(name: str, p: list[float], q: list[float]) -> float:
    pairs = list(zip(p, q, strict=True))
    reverse = sum(a * math.log(a / b) for a, b in pairs)
    forward = sum(b * math.log(b / a) for a, b in pairs)
    return {
        "reverse": reverse,
        "forward": forward,
        "jeffreys": (reverse + forward) / 2,
        "alpha ½": 4 * (1 - sum(math.sqrt(a * b) for a, b in pairs)),
        "alpha 2": (sum(a * a / b for a, b in pairs) - 1) / 2,
    }[name]


@pytest.mark.parametrize("name", EVERY)
def test_value_and_gradient_at_a_state(name: str) -> None:
    """`full` is the divergence, of which k1 and k3 are unbiased estimates, and `reinforce` weighs the score."""
    logits = LOGITS.clone().requires_grad_()
    p, q = LOGITS.softmax(-1), REFERENCE.softmax(-1)
    divergence, kappa = made(name), p.log() - q.log()
    exact = ESTIMATORS["full"](None, divergence, logits=logits, logits_reference=REFERENCE)
    wanted = by_hand(name, p.tolist(), q.tolist())
    assert float(exact.detach()) == pytest.approx(wanted, rel=1e-12)
    for estimator in ("k1", "k3"):
        assert float(p @ ESTIMATORS[estimator](kappa, divergence)) == pytest.approx(wanted, rel=1e-12)
    assert bool((ESTIMATORS["k3"](kappa, divergence) > 0).all())
    (gradient,) = torch.autograd.grad(exact, logits)
    scores = torch.eye(4, dtype=torch.float64) - p
    torch.testing.assert_close((p * ESTIMATORS["reinforce"](kappa, divergence)) @ scores, gradient, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_all_vanish_and_agree_to_second_order_at_the_reference(name: str) -> None:
    divergence = made(name)
    near = torch.tensor([-1e-4, 0.0, 1e-4], dtype=torch.float64)
    torch.testing.assert_close(divergence.nonnegative(near), near.square() / 2, rtol=3e-4, atol=1e-15)
    torch.testing.assert_close(divergence.coefficient(near), near, rtol=3e-4, atol=0)
    for function in (divergence.plain, divergence.nonnegative, divergence.coefficient):
        assert float(function(near)[1]) == 0.0


def test_the_family_of_orders_reaches_both_kls() -> None:
    kappa = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    for function in ("plain", "nonnegative", "coefficient"):

        def at(alpha: float, function: str = function) -> Tensor:
            return getattr(DIVERGENCES["alpha"](alpha=alpha), function)(kappa)

        constant = {"plain": 0, "nonnegative": 0, "coefficient": 0}[function]
        reverse = getattr(DIVERGENCES["reverse"](), function)(kappa)
        torch.testing.assert_close(at(1 - 1e-7) + constant, reverse, rtol=1e-5, atol=1e-6)
        assert torch.equal(at(1.0), reverse)
    for function in ("nonnegative", "coefficient"):
        near = getattr(DIVERGENCES["alpha"](alpha=1e-6), function)(kappa)
        torch.testing.assert_close(near, getattr(DIVERGENCES["forward"](), function)(kappa), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_symbols_that_both_exclude_count_for_nothing(name: str) -> None:
    inside, out = torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor([-math.inf], dtype=torch.float64)
    other = torch.tensor([0.0, 0.7], dtype=torch.float64)
    logits = torch.cat([inside, out]).requires_grad_()
    found = ESTIMATORS["full"](None, made(name), logits=logits, logits_reference=torch.cat([other, out]))
    wanted = by_hand(name, inside.softmax(-1).tolist(), other.softmax(-1).tolist())
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.grad(found, logits)[0].isfinite().all()


@pytest.mark.parametrize(("name", "missing"), [("forward", "policy"), ("jeffreys", "policy"), ("jeffreys", "reference"),
                                               ("reverse", "reference"), ("alpha 2", "reference")])  # fmt: skip
def test_a_support_that_is_missing_shows_as_infinite(name: str, missing: str) -> None:
    whole, lacking = torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64)
    logits, reference = (lacking, whole) if missing == "policy" else (whole, lacking)
    assert float(ESTIMATORS["full"](None, made(name), logits=logits, logits_reference=reference)) == math.inf


def test_forward_kl_counts_symbols_of_a_probability_that_underflows() -> None:
    logits, reference = torch.tensor([0.0, -120.0]), torch.tensor([0.0, -4.0])
    found = ESTIMATORS["full"](None, made("forward"), logits=logits, logits_reference=reference)
    q = reference.double().softmax(-1)
    wanted = float(q @ (q.log() - logits.double().log_softmax(-1)))
    assert wanted > 2.0
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_what_does_not_depend_on_the_divergence_is_idle() -> None:
    for settings in ({"estimator": "k2"}, {"estimator": "abs"}, {"placement": "none"}, {"beta": 0.0}):
        plain, other = Objective(**settings), Objective(**settings, divergence="alpha", alpha=0.3)
        assert other.canonical() == plain.canonical()
        assert {"divergence", "alpha"} <= set(other.canonical_form().idle)
    assert Objective(divergence="alpha", alpha=1.0).canonical() == Objective().canonical()
    assert Objective(estimator="reinforce").canonical() == Objective(estimator="k1").canonical()
    assert Objective(divergence="forward").canonical() != Objective().canonical()
    with pytest.raises(UserError, match="no chosen value uses this parameter"):
        Objective(divergence="forward", alpha=0.3)


def test_a_divergence_of_the_users_own_equals_the_built_in_one(tmp_path: Any) -> None:
    from klab.grid import user_code
    from klab.grid.custom_values import SIGNATURES

    (tmp_path / "mine.py").write_text(SIGNATURES["divergence"].example)
    batch = tokens([[-0.5, -2.0]], behaviour=[[-0.6, -1.5]], reference=[[-1.0, -1.2]])
    settings: dict[str, Any] = {"placement": "loss_corrected", "beta": 0.5, "advantage": "raw"}
    with user_code.searching(tmp_path):
        own = Objective(divergence={"name": "./mine.py:chi_squared", "scale": 1.0}, **settings)
        ours = objective_loss(own, batch).loss
    built_in = objective_loss(Objective(divergence="alpha", alpha=2.0, **settings), batch).loss
    torch.testing.assert_close(ours, built_in, rtol=1e-14, atol=0)
