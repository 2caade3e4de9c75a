"""The shapes in the signatures are the shapes of the tensors: every built-in axis value, on random updates."""

from __future__ import annotations

import inspect
import random
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from jaxtyping import AbstractArray, jaxtyped

from klab.grid import Objective
from klab.grid.custom_values import VIEW
from klab.harness.objective import Groups, Returns, Totals, update_context
from klab.harness.objective.aggregate import AGGREGATIONS
from klab.harness.objective.batch import TokenBatch
from klab.harness.objective.divergence import FORWARD
from klab.harness.objective.functions import PATHS
from klab.harness.objective.inputs import View
from klab.harness.objective.kl import ESTIMATORS
from klab.harness.objective.loss import LossOutput, UpdateContext, objective_loss
from klab.harness.objective.masking import last_token_mask, left_align, lengths, masked, suffix_sum, undo_left_align
from klab.harness.objective.metrics import TokenStats
from klab.harness.objective.ratio import RATIOS
from klab.harness.objective.values import ADVANTAGES, SOLVERS, WEIGHTS
from tests.support.random_batches import PARAMETERS, random_batch


def _fits(value: object, annotation: Any) -> bool:
    """Whether a value has the annotated shape; annotations other than jaxtyping's are not looked at."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    shapes = [each for each in options if inspect.isclass(each) and issubclass(each, AbstractArray)]
    return not shapes or value is None or any(isinstance(value, each) for each in shapes)


def _called(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a function and hold its arguments and its result to one assignment of the dimensions in its signature."""
    hints = typing.get_type_hints(function)
    with jaxtyped("context"):
        for name, value in arguments.items():
            assert _fits(value, hints[name]), f"{function.__name__}: {name} {tuple(value.shape)} is no {hints[name]}"
        result = function(**arguments)
        assert _fits(result, hints["return"]), f"{function.__name__}: {tuple(result.shape)} is no {hints['return']}"
    return result


def _functions() -> list[tuple[str, Callable[..., Any]]]:
    registries = (ESTIMATORS, RATIOS, WEIGHTS, ADVANTAGES, AGGREGATIONS, PATHS)
    return [(f"{registry.axis}-{name}", function) for registry in registries for name, function in registry.items()]


def _inputs(batch: TokenBatch) -> Mapping[str, Any]:
    mask = batch.mask
    log_ratio = masked(batch.logp.detach() - batch.logp_behaviour, mask)
    token_rewards = torch.where(last_token_mask(mask), batch.rewards[:, None], 0.0)
    groups = Groups.from_labels(batch.groups)
    returns = Returns(suffix_sum(token_rewards), token_rewards, batch.rewards, mask, groups)
    view = View(batch, mask, advantage=returns.returns, ratio=log_ratio.exp(), groups=groups)
    return {
        **view.inputs(set(VIEW) - {"values", "entropy"}),
        "log_ratio": log_ratio, "mask": mask, "ratio": log_ratio.exp(), "advantage": returns.returns,
        "returns": returns, "terms": log_ratio, "totals": Totals.of(mask, groups, batch.max_new_tokens),
        "logp": log_ratio, "log_rho": log_ratio, "logits": batch.logits, "logits_reference": batch.logits_reference,
        "greedy_rewards": batch.greedy_rewards, "kept": mask, "dropped": mask, "penalised": mask,
        "q": torch.tensor(0.5, dtype=torch.float64),
        "divergence": FORWARD,
        **{name: values[0] for name, values in PARAMETERS.items() if name != "q"},
    }  # fmt: skip


@pytest.mark.parametrize(("name", "function"), _functions(), ids=[name for name, _ in _functions()])
def test_an_axis_value_takes_and_gives_the_shapes_of_its_signature(name: str, function: Callable[..., Any]) -> None:
    for seed in range(5):
        inputs = _inputs(random_batch(random.Random(seed), garbage=0.0))
        if name == "weight-power":
            inputs = {**inputs, "q": 0.5}
        _called(function, **{parameter: inputs[parameter] for parameter in inspect.signature(function).parameters})


def test_helpers_take_and_give_the_shapes_of_their_signatures() -> None:
    inputs = _inputs(random_batch(random.Random(8), garbage=0.0))
    values, mask = inputs["log_ratio"], inputs["mask"]
    for function in (masked, left_align, undo_left_align):
        _called(function, values=values, mask=mask)
    for function in (lengths, last_token_mask):
        _called(function, mask=mask)
    _called(suffix_sum, values=values)
    assert SOLVERS["adaptive"](values, mask, ess=0.9)["q"].shape == ()
    _called(SOLVERS["second_moment_mask"], log_rho=values, mask=mask, advantage=inputs["advantage"], moment=0.04)


@pytest.mark.parametrize("seed", range(10))
def test_the_fields_of_an_update_have_the_annotated_shapes(seed: int) -> None:
    batch = random_batch(random.Random(seed), garbage=0.0)
    context = update_context(Objective(weight="adaptive", advantage="gae"), batch)
    output = objective_loss(Objective(weight="adaptive", advantage="gae"), batch, context)
    for record, kind in ((batch, TokenBatch), (context, UpdateContext), (output, LossOutput)):
        _hold(record, kind)
    _hold(output.token_stats, TokenStats)


def _hold(record: object, kind: type) -> None:
    hints = typing.get_type_hints(kind)
    with jaxtyped("context"):
        for name, annotation in hints.items():
            assert _fits(getattr(record, name), annotation), f"{kind.__name__}.{name}"


def test_a_wrong_shape_is_noticed() -> None:
    batch = random_batch(random.Random(1), garbage=0.0)
    with pytest.raises(AssertionError, match="token: mask"):
        _called(RATIOS["token"], log_ratio=batch.logp.detach(), mask=batch.mask[:, :0])
