"""Composed formulas say what the code computes: the loss, its derivative, and the gradient printed beside it."""

from __future__ import annotations

import random
from typing import get_args

import pytest
import sympy
import torch

from klab.grid import Objective
from klab.grid.algorithms import algorithm_names, load_algorithm
from klab.grid.catalogue import AXES
from klab.grid.formula.compose import compose
from klab.grid.formula.training import CORRECTIONS, DIVERGENCES, LEVELS, REACHES, numbers
from klab.grid.schema.sampler import Rejection, Sampler
from klab.grid.schema.training import TrainingSection
from klab.harness.objective import LossCoefficients, TokenBatch, objective_loss, update_context
from klab.harness.training.data.sampler_mismatch import correction_weights
from tests.grid.formula.evaluation import Evaluation, logit_symbol, logp, score
from tests.harness.objective.oracle import Trajectory
from tests.support.random_batches import random_objective, trajectories

TOLERANCE = 1e-9
VALUES = [(axis, value) for axis in AXES for value in AXES[axis].values]


def toy(seed: int, on_policy: bool = False) -> TokenBatch:
    """Five trajectories of two prompts, up to three own tokens each with gaps between them."""
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    n, t, v = 5, 3, 3
    mask = torch.rand(n, t, generator=noise) < 0.6
    mask[:, 1] = True
    behaviour = -0.3 - normal(n, t).abs()
    now = behaviour if on_policy else (behaviour + 0.2 * normal(n, t)).clamp(max=-0.01)
    return TokenBatch(
        logp=now.clone().requires_grad_(),
        logp_behaviour=behaviour,
        logp_reference=behaviour + 0.5 * normal(n, t),
        mask=mask,
        rewards=torch.tensor([1.0, 0.3, -0.4, 0.7, 0.0], dtype=torch.float64) + 0.1 * normal(n),
        groups=torch.tensor([0, 1, 0, 0, 1]),
        max_new_tokens=6,
        logits=normal(n, t, v).requires_grad_(),
        logits_reference=normal(n, t, v),
        greedy_rewards=normal(n),
        values=normal(n, t),
        reward_terms=normal(n, 2),
        term_weights=(1.0, -0.5),
    )


def check(
    objective: Objective,
    batch: TokenBatch,
    on_policy: bool = False,
    training: TrainingSection | None = None,
    sampled: torch.Tensor | None = None,
) -> None:
    """Loss and gradient of the code against the printed formulas.

    Where log ρ and ℓ have the same gradient, ℓ is printed: the loss is then that of the path `score`.
    """
    trained, coefficients = batch, LossCoefficients()
    if training is not None:
        trained, coefficients = _as_trained(batch, training, sampled)
    leaves = [batch.logp, batch.logits]
    by_logp, by_logits = torch.autograd.grad(_loss(objective, trained, coefficients), leaves, materialize_grads=True)
    made = compose(objective, on_policy, training)
    printed_path = Objective(**(objective.settings() | {"path": made.active["path"]}))
    loss = float(_loss(printed_path, trained, coefficients).detach())

    values = {symbol: float(value) for symbol, (value, _) in numbers(training).items()}
    values |= {symbol: float(value) for symbol, (_, value) in made.parameters.items()}
    values["sample"] = 1.0 if made.active.get("advantage.std") == "sample" else 0.0
    own = trajectories(batch)
    drawn = None if sampled is None else [sampled[n, t.columns].exp().tolist() for n, t in enumerate(own)]
    evaluation = Evaluation([(e.left, e.right) for e in made.equations], values, own, batch.max_new_tokens, drawn)
    value, expression, at = evaluation.loss()
    assert value == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE)
    tokens = [(n, j) for n, trajectory in enumerate(own) for j in range(trajectory.length)]
    derived = _numbers([expression.diff(logp(*token)) for token in tokens], at)
    printed = evaluation.gradient()
    for token, slope in zip(tokens, derived, strict=True):
        wanted = pytest.approx(float(by_logp[_cell(own, token)]), rel=TOLERANCE, abs=TOLERANCE)
        assert slope == wanted
        assert float(printed.diff(score(*token))) == wanted
    if expression.has(logit_symbol(0, 0, 0)):
        for token in tokens[:4]:
            _check_logits(expression, printed, at, by_logits[_cell(own, token)], token)
    else:
        assert not by_logits.any()


def _loss(objective: Objective, batch: TokenBatch, coefficients: LossCoefficients) -> torch.Tensor:
    return objective_loss(objective, batch, update_context(objective, batch, coefficients)).loss


def _as_trained(
    batch: TokenBatch, training: TrainingSection, sampled: torch.Tensor | None
) -> tuple[TokenBatch, LossCoefficients]:
    """The batch as training hands it to the objective."""
    changes: dict[str, torch.Tensor | None] = {}
    if training.sampler is not None and sampled is not None:
        changes["correction"] = correction_weights(training.sampler, batch.logp_behaviour, sampled, batch.mask)
    if training.overlong_buffer is not None:
        excess = batch.mask.sum(1) - (batch.max_new_tokens - training.overlong_buffer)
        changes["rewards"] = batch.rewards - training.overlong_penalty * (excess / training.overlong_buffer).clamp(0, 1)
    trust = 0.0 if training.trust_region is None else training.trust_region.coefficient
    return batch.replace(**changes), LossCoefficients(trust=trust)


def _cell(own: list[Trajectory], token: tuple[int, int]) -> tuple[int, int]:
    """Where a token stands in the batch."""
    return token[0], own[token[0]].columns[token[1]]


def _numbers(expressions: list[sympy.Expr], at: dict[sympy.Symbol, float]) -> list[float]:
    return [float(value) for value in sympy.lambdify(list(at), expressions, "math", cse=True)(*at.values())]


def _check_logits(
    expression: sympy.Expr,
    printed: sympy.Expr,
    at: dict[sympy.Symbol, float],
    wanted: torch.Tensor,
    token: tuple[int, int],
) -> None:
    """The same for the logits of a token: ∂ log π(v)/∂z(u) is 1[u = v] − π(u)."""
    symbols = [logit_symbol(*token, v) for v in range(len(wanted))]
    own = expression.as_independent(*symbols, as_Add=True)[1]
    derived = _numbers([own.diff(symbol) for symbol in symbols], at)
    slopes = [float(printed.diff(sympy.Symbol(f"h_{token[0]}_{token[1]}_{v}"))) for v in range(len(wanted))]
    logits = torch.tensor([at[symbol] for symbol in symbols], dtype=torch.float64)
    chained = torch.tensor(slopes, dtype=torch.float64) - logits.softmax(0) * sum(slopes)
    assert derived == pytest.approx(wanted.tolist(), rel=TOLERANCE, abs=TOLERANCE)
    assert chained.tolist() == pytest.approx(wanted.tolist(), rel=TOLERANCE, abs=TOLERANCE)


def drawn(source: random.Random, **fixed: str) -> Objective:
    """A random objective, without equal ratios beside the mask that leaves out the last of equal ones first."""
    objective = random_objective(source, **fixed)
    while objective.weight == "second_moment_mask" and objective.ratio in (
        "sequence_mean",
        "sequence_product",
        "clipped_mean",
    ):
        objective = random_objective(source, **fixed)
    return objective


@pytest.mark.parametrize(("axis", "value"), VALUES, ids=[f"{axis}-{value}" for axis, value in VALUES])
def test_every_value_is_printed_as_it_is_computed(axis: str, value: str) -> None:
    source = random.Random(f"{axis} {value}")
    check(drawn(source, **{axis: value}), toy(source.randrange(1000)))


@pytest.mark.parametrize("name", algorithm_names())
def test_every_named_algorithm_is_printed_as_it_is_computed(name: str) -> None:
    check(Objective(**load_algorithm(name).objective), toy(1))


@pytest.mark.parametrize("seed", range(30))
def test_random_combinations_are_printed_as_they_are_computed(seed: int) -> None:
    source = random.Random(seed)
    on_policy = source.random() < 0.25
    check(drawn(source), toy(seed, on_policy), on_policy)


CORRECTED = [
    {"correction": "tis", "floor": 0.9, "cap": 1.1},
    {"correction": "tis", "level": "sequence", "cap": 1.1},
    {"correction": "icepop", "low": 0.9, "high": 1.2},
    {"correction": "icepop", "level": "sequence", "low": 0.9, "high": 1.2},
    *({"reject": {"divergence": divergence, "over": over, "high": 1.02 if divergence == "k1" else 0.01}}
      for divergence in DIVERGENCES for over in REACHES if (divergence, over) != ("k1", "max")),
    {"correction": "tis", "reject": {"divergence": "k1", "over": "token", "high": 1.1, "low": 0.95}},
]  # fmt: skip


@pytest.mark.parametrize("sampler", CORRECTED, ids=str)
def test_the_corrections_of_a_sampler_are_printed_as_they_are_computed(sampler: dict[str, object]) -> None:
    batch = toy(3)
    noise = torch.Generator().manual_seed(5)
    sampled = batch.logp_behaviour + 0.15 * torch.randn(batch.logp.shape, generator=noise, dtype=torch.float64)
    training = TrainingSection(updates_per_rollout=2, sampler=Sampler(**sampler))
    check(Objective(), batch, training=training, sampled=sampled)


@pytest.mark.parametrize(
    "more", [{"trust_region": {"coefficient": 0.3}}, {"overlong_buffer": 5, "overlong_penalty": 0.7}]
)
def test_what_training_adds_is_printed_as_it_is_computed(more: dict[str, object]) -> None:
    check(Objective(ratio="future_mean", path="ratio"), toy(4), training=TrainingSection(updates_per_rollout=2, **more))


@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_an_entropy_bonus_whose_coefficient_moves_is_printed_as_in_the_first_update(bonus: float) -> None:
    training = TrainingSection(updates_per_rollout=2, entropy_control={"target": 0.2})
    made = compose(Objective(entropy_bonus=bonus), training=training)
    assert "S_{j}" in [equation.left for equation in made.equations]
    check(Objective(entropy_bonus=bonus), toy(6), training=training)


def test_every_correction_of_a_sampler_has_latex() -> None:
    def words(model: type, field: str) -> set[str]:
        return set(get_args(model.model_fields[field].annotation))  # type: ignore[attr-defined]

    assert set(CORRECTIONS) == words(Sampler, "correction")
    assert set(LEVELS) == words(Sampler, "level")
    assert set(DIVERGENCES) == words(Rejection, "divergence")
    assert set(REACHES) == words(Rejection, "over")
