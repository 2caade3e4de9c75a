"""The user's own axis values are called like the built-in ones, with their parameters; what does not fit is named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from klab.grid import Objective, UserError
from klab.grid.custom_values import SIGNATURES
from klab.grid.yaml_document import parse_yaml
from klab.harness.objective import axis_functions, objective_loss, update_context
from tests.support.random_batches import gradient, random_batch

HERE = "tests.support.custom_values"
BATCH = random_batch(random.Random(11), drift=0.3)


def _own(name: str, **parameters: object) -> dict[str, object]:
    return {"name": f"{HERE}:{name}", **parameters}


@pytest.mark.parametrize(
    ("custom", "built_in"),
    [
        ({"placement": _own("half_loss", beta=0.8)}, {"placement": "loss", "beta": 0.4}),
        ({"aggregation": f"{HERE}:token_sum"}, {"aggregation": "token_mean"}),
        ({"path": f"{HERE}:both"}, {"path": "score"}),
        ({"weight": f"{HERE}:anything"}, {"weight": "ratio"}),
        ({"ratio": f"{HERE}:half_token", "weight": "ratio"}, {"weight": "power", "q": 0.5}),
        ({"advantage": _own("clipped_return", limit=1e9)}, {"advantage": "raw"}),
        ({"estimator": _own("quartic", strength=0.0)}, {"placement": "none"}),
    ],
)
def test_a_custom_value_acts_as_the_built_in_one_that_it_imitates(custom: dict, built_in: dict) -> None:
    torch.testing.assert_close(
        gradient(Objective(**custom), BATCH), gradient(Objective(**built_in), BATCH), rtol=1e-12, atol=1e-14
    )


def test_parameters_reach_the_function() -> None:
    weights = [objective_loss(Objective(weight=_own("soft", tau=tau)), BATCH).token_stats.weight for tau in (0.5, 2.0)]
    rho = objective_loss(Objective(weight="ratio"), BATCH).token_stats.weight
    for weight, tau in zip(weights, (0.5, 2.0), strict=True):
        torch.testing.assert_close(weight, torch.tanh(rho / tau) * tau)


def test_custom_values_are_cut_into_micro_batches_like_the_others() -> None:
    objective = Objective(
        estimator=_own("quartic", strength=0.2), weight=_own("soft", tau=2.0), aggregation=f"{HERE}:token_sum"
    )
    context = update_context(objective, BATCH)
    pieces = [objective_loss(objective, BATCH.rows(r), context.rows(r)).loss for r in (slice(0, 1), slice(1, None))]
    torch.testing.assert_close(sum(pieces), objective_loss(objective, BATCH).loss, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("no.such.package:soft", "weight: there is no module 'no' .*working folder"),
        (f"{HERE}.deeper:soft", "there is no module"),
        (f"{HERE}:sofd", f"has no 'sofd'.*did you mean '{HERE}:soft'"),
        (f"{HERE}:NOT_A_FUNCTION", "not a function"),
        ({"name": f"{HERE}:soft", "tua": 2.0}, "no such parameter .*did you mean 'tau'"),
        (f"{HERE}:soft", "cannot be called: missing a required.* argument: 'tau'.*soft\\(ratio, advantage\\)"),
        (f"{HERE}:token_sum", "cannot be called: missing a required argument: 'totals'"),
    ],
)
def test_mistakes_are_named(weight: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        objective_loss(Objective(weight=weight), BATCH)


def test_errors_of_the_users_own_module_propagate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "klab_broken_weights.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        objective_loss(Objective(weight="klab_broken_weights:soft"), BATCH)


@pytest.mark.parametrize("axis", SIGNATURES)
def test_the_example_of_every_axis_runs_as_it_is_printed(
    axis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = SIGNATURES[axis]
    module = f"klab_example_of_{axis}"
    (tmp_path / f"{module}.py").write_text(signature.example)
    monkeypatch.syspath_prepend(tmp_path)
    written = parse_yaml(signature.written.replace("mine:", f"{module}:"), "example")
    others = {"ratio": "future_mean", "weight": "ratio", "advantage": "raw"}
    custom, built_in = Objective(**{**others, **written}), Objective(**others)
    batch = random_batch(random.Random(5), drift=0.3)
    assert axis_functions(custom).needs <= set(signature.optional)
    found = gradient(custom, batch)
    assert bool(found.isfinite().all())
    assert not torch.allclose(found, gradient(built_in, batch))


def test_a_custom_function_is_given_the_optional_inputs_that_its_parameters_name() -> None:
    batch = random_batch(random.Random(3), drift=0.2, garbage=0.0)
    for custom, built_in in (
        ({"estimator": f"{HERE}:whole_vocabulary", "placement": "loss"}, {"estimator": "full", "placement": "loss"}),
        ({"advantage": f"{HERE}:against_greedy"}, {"advantage": "greedy_baseline"}),
    ):
        assert axis_functions(Objective(**custom)).needs == axis_functions(Objective(**built_in)).needs
        losses = [objective_loss(Objective(**written), batch).loss.detach() for written in (custom, built_in)]
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-12)


def test_an_estimator_on_logits_needs_them_only_where_there_is_a_kl_term() -> None:
    assert axis_functions(Objective(estimator="full", placement="reward")).needs == {"logits", "logits_reference"}
    for placement in ("none", "log_ratio"):
        assert not axis_functions(Objective(estimator="full", placement=placement)).needs
        assert not axis_functions(Objective(estimator=f"{HERE}:whole_vocabulary", placement=placement)).needs


def test_an_optional_input_is_no_parameter_of_the_grid_file() -> None:
    with pytest.raises(UserError, match=r"no such parameter.*greedy_rewards"):
        objective_loss(Objective(advantage=_own("against_greedy", greedy_rewards=1.0)), BATCH)
