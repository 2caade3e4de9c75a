"""The weights have the properties that the catalogue states, and come from the surrogates that papers print."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from klab.grid import Objective
from klab.grid.catalogue import AXES, PARAMETERS
from klab.grid.custom_values import VIEW
from klab.harness.objective import TokenBatch
from klab.harness.objective.inputs import View
from klab.harness.objective.values import WEIGHTS
from klab.harness.objective.weight import largest_exponent
from tests.harness.objective.oracle import largest_exponent as by_halving

WEIGHT_VALUES = AXES["weight"].values
DENSE = torch.logspace(-3, 3, 2001, dtype=torch.float64)


def _weight(name: str, ratios: Tensor, advantage: float, parameters: dict[str, float]) -> Tensor:
    """Of trajectories of one token that had probability 0.001."""
    advantages = torch.full_like(ratios, advantage)
    if name == "adaptive":
        parameters = {"q": parameters["ess"]}  # any exponent in [0, 1] may be what the update asks for
    if name == "second_moment_mask":  # each token as an update of its own
        far = ratios.log().square() > parameters["moment"]
        parameters = {"kept": ~(far & (ratios.log() * advantages > 0))[:, None]}
    if name == "clip_cov":  # of a token that is not drawn
        clip = {end: parameters[end] for end in ("eps_low", "eps_high")}
        parameters = {"dropped": torch.zeros_like(ratios, dtype=torch.bool)[:, None], **clip}
    if name == "kl_cov":
        nobody = torch.zeros_like(ratios, dtype=torch.bool)[:, None]
        parameters = {"penalised": nobody, "cov_penalty": parameters["cov_penalty"]}
    old = torch.full_like(ratios, math.log(1e-3))[:, None]
    mask = torch.ones_like(old, dtype=torch.bool)
    rows = torch.arange(len(ratios))
    batch = TokenBatch(old + ratios.log()[:, None], old, old, mask, torch.zeros(len(ratios)), rows, max_new_tokens=1)
    asked = View(batch, mask).inputs(set(inspect.signature(WEIGHTS[name]).parameters) & set(VIEW) - _POSITIONAL)
    return WEIGHTS[name](ratios[:, None], advantages[:, None], **asked, **parameters)[:, 0]


_POSITIONAL = {"ratio", "advantage"}


@st.composite
def _parameters(draw: st.DrawFn, name: str) -> dict[str, float]:
    chosen = {}
    for parameter in WEIGHT_VALUES[name].parameters:
        entry = PARAMETERS[parameter]
        high = min(entry.high, 20.0)
        chosen[parameter] = draw(st.floats(entry.low, high, exclude_min=entry.open_low))
    Objective(weight=name, **({} if name == "mask" else chosen))  # the catalogue allows them
    return chosen


STATED_FAMILY = [name for name, value in WEIGHT_VALUES.items() if value.in_family]
STATED_MONOTONE = [name for name, value in WEIGHT_VALUES.items() if value.monotone]
RATIO = st.floats(1e-6, 1e6)
ADVANTAGE = st.sampled_from([-2.0, 0.0, 0.5])


@pytest.mark.parametrize("name", STATED_FAMILY)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), ratio=RATIO, advantage=ADVANTAGE)
def test_in_the_family_as_stated(name: str, data: st.DataObject, ratio: float, advantage: float) -> None:
    ratios = torch.tensor([ratio], dtype=torch.float64)
    weight = float(_weight(name, ratios, advantage, data.draw(_parameters(name))))
    assert min(ratio, 1.0) * (1 - 1e-12) <= weight <= max(ratio, 1.0) * (1 + 1e-12)


@pytest.mark.parametrize("name", STATED_MONOTONE)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), pair=st.tuples(RATIO, RATIO), advantage=ADVANTAGE)
def test_monotone_as_stated(name: str, data: st.DataObject, pair: tuple[float, float], advantage: float) -> None:
    ratios = torch.tensor(sorted(pair), dtype=torch.float64)
    low, high = _weight(name, ratios, advantage, data.draw(_parameters(name))).tolist()
    assert low <= high * (1 + 1e-12)


@pytest.mark.parametrize("name", [name for name in WEIGHT_VALUES if name not in STATED_FAMILY])
def test_outside_the_family_as_stated(name: str) -> None:
    parameters = Objective(weight=name).arguments("weight")
    outside = [
        (weight < torch.clamp(DENSE, max=1.0)) | (weight > torch.clamp(DENSE, min=1.0))
        for weight in (_weight(name, DENSE, advantage, parameters) for advantage in (-1.0, 1.0))
    ]
    assert bool(torch.stack(outside).any())


@pytest.mark.parametrize("name", [name for name in WEIGHT_VALUES if name not in STATED_MONOTONE])
def test_not_monotone_as_stated(name: str) -> None:
    parameters = Objective(weight=name, **({"tv_scale": 0.5} if name == "drpo_tv" else {})).arguments("weight")
    assert any(bool((_weight(name, DENSE, a, parameters).diff() < 0).any()) for a in (-1.0, 1.0))


@pytest.mark.parametrize("name", list(WEIGHT_VALUES))
def test_weights_are_exactly_one_at_ratio_one(name: str) -> None:
    ratios = torch.ones(3, dtype=torch.float64)
    advantages = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    for advantage in advantages.tolist():
        parameters = Objective(weight=name).arguments("weight")
        assert torch.equal(_weight(name, ratios, advantage, parameters), ratios)


@pytest.mark.parametrize("advantage", [-1.5, 2.0])
@pytest.mark.parametrize(
    ("name", "surrogate"),
    [
        ("ratio", lambda r, a: r * a),
        ("one", lambda r, a: (1 + r.log()) * a),
        ("ppo_clip", lambda r, a: torch.minimum(r * a, r.clamp(0.8, 1.2) * a)),
        ("dual_clip", lambda r, a: _dual(r, a)),
        ("sigmoid", lambda r, a: 4 / _tau(a) * torch.sigmoid(_tau(a) * (r - 1)) * a),
    ],
)
def test_the_weight_is_rho_times_the_slope_of_its_surrogate(name: str, surrogate, advantage: float) -> None:
    ratios = DENSE.clone().requires_grad_()
    slope = torch.autograd.grad(surrogate(ratios, torch.full_like(DENSE, advantage)).sum(), ratios)[0]
    weight = _weight(name, DENSE, advantage, Objective(weight=name).arguments("weight"))
    torch.testing.assert_close(weight * advantage, DENSE * slope, rtol=1e-9, atol=1e-12)


def _tau(a: Tensor) -> Tensor:
    return torch.where(a > 0, a.new_tensor(1.0), a.new_tensor(1.05))


def _dual(r: Tensor, a: Tensor) -> Tensor:
    clipped = torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
    return torch.where(a < 0, torch.maximum(clipped, 3.0 * a), clipped)


def test_ppo_clip_follows_the_five_cases() -> None:
    ratios = torch.tensor([1.1, 1.3, 0.7, 1.3, 0.7], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    weights = WEIGHTS["ppo_clip"](ratios, advantages, eps_low=0.2, eps_high=0.2)
    assert weights.tolist() == [1.1, 0.0, 0.7, 1.3, 0.0]


def test_filters_keep_an_overflowed_ratio_out() -> None:
    ratios, advantages = torch.tensor([math.inf]), torch.tensor([1.0])
    for name in ("ppo_clip", "dual_clip", "truncate_clip", "mask"):
        assert float(_weight(name, ratios, 1.0, Objective(weight=name).arguments("weight"))) == 0.0
    assert not WEIGHTS["ratio"](ratios, advantages).isfinite().any()


@settings(max_examples=40, deadline=None)
@given(
    log_rho=st.lists(st.floats(-3, 3), min_size=1, max_size=12),
    target=st.floats(0.05, 0.999),
)
def test_adaptive_finds_the_largest_exponent(log_rho: list[float], target: float) -> None:
    values = torch.tensor([[*log_rho, 50.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * len(log_rho) + [False]])
    q = float(largest_exponent(values, mask, ess=target)["q"])
    expected = by_halving(log_rho, target)

    def share(exponent: float) -> float:
        w = [math.exp(exponent * x) for x in log_rho]
        return sum(w) ** 2 / (len(w) * sum(x * x for x in w))

    assert share(q) >= target - 1e-9
    if expected < 1.0 and max(log_rho) - min(log_rho) > 0.01:
        assert q == pytest.approx(expected, abs=1e-9)
        assert share(min(1.0, q + 1e-4)) < target + 1e-9
    if expected == 1.0 and share(1.0) > target + 1e-12:
        assert q == 1.0
