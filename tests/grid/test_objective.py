import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klab.grid import Objective, UserError
from klab.grid.catalogue import AXES, PARAMETERS

AXIS_VALUES = st.fixed_dictionaries({axis.name: st.sampled_from(list(axis.values)) for axis in AXES.values()})


def test_defaults_are_the_contract():
    objective = Objective()
    assert (objective.estimator, objective.placement, objective.ratio, objective.weight) == (
        "k3",
        "loss",
        "token",
        "ppo_clip",
    )
    assert (objective.advantage, objective.aggregation, objective.path) == ("group_norm", "sequence_mean", "score")
    expected = dict(beta=0.04, eps_low=0.2, eps_high=0.2, q=0.5, cap=1.2, c=3.0, low=0.5, high=2.0, tau_pos=1.0)
    expected |= dict(tau_neg=1.05, ess=0.9, gamma=1.0, lam=1.0, whiten="none", std="population", eps=1e-6)
    expected |= dict(rejected=0.0, kl_scale="mean", kl_at="rollout", ceiling=4.0, tv_low=0.15, tv_high=0.15)
    expected |= dict(kl_low=0.05, kl_high=0.05, truncation=20.0, drift=0.2, worst=0.5, moment=0.04, k_pos=2.0)
    expected |= dict(rate_pos=3.0, k_neg=3.0, rate_neg=2.0, half_life=32.0, influence=0.2, safety=4.0)
    expected |= dict(clip_low=0.4, clip_high=0.4, cov_share=0.0002, cov_low=1.0, cov_high=5.0, cov_penalty=1.0)
    expected |= dict(log_low=0.025, log_high=0.05, log_ceiling=0.05, growth=0.5, tv_limit=0.15, least_weight=0.8)
    expected |= dict(budget=0.02, tv_scale=12.5, band=0.1, band_penalty=1e-3, entropy_bonus=0.0, entropy_share=1.0)
    expected |= dict(alpha=0.5)
    assert {name: getattr(objective, name) for name in PARAMETERS} == expected


def test_a_parameter_of_the_chosen_value_is_taken():
    assert Objective(weight="power", q=0.25).q == 0.25
    assert Objective(weight={"name": "power", "q": 0.25}) == Objective(weight="power", q=0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(weight="one", q=0.3), "q: no chosen value uses this parameter (got 0.3) It belongs to weight: power."),
        (dict(placement="none", beta=0.1), "no chosen value uses"),
        (dict(placement="log_ratio", beta=0.1), "no chosen value uses"),
        (dict(weight="pwer"), "did you mean 'power'"),
        (dict(estimator="K3 plus"), "did you mean 'k3_plus'"),
        (dict(bta=0.1), "did you mean 'beta'"),
        (dict(weight="power", q=1.5), "≥ 0 and ≤ 1"),
        (dict(beta=-1.0), "≥ 0"),
        (dict(beta=float("nan")), "out of range"),
        (dict(beta="0.1"), "not a number"),
        (dict(beta=True), "not a number"),
        (dict(std="bessel"), "population, sample"),
        (dict(weight={"name": "power", "c": 1.0}), "'power' has no such parameter"),
        (dict(weight={"q": 1.0}), "needs a name"),
        (dict(weight={"name": "power", "q": 0.1}, q=0.2), "given twice"),
        (dict(weight="mask", low=3.0), "low must not exceed high"),
        (dict(weight=3), "unknown weight"),
    ],
)
def test_mistakes_name_key_value_and_the_nearest(settings, message):
    with pytest.raises(UserError) as caught:
        Objective(**settings)
    assert message in str(caught.value)


def test_frozen_hashable_and_reproducible():
    objective = Objective(weight="adaptive", ess=0.5, placement="reward", estimator="k1", kl_at="current")
    with pytest.raises(AttributeError):
        objective.beta = 1.0
    assert pickle.loads(pickle.dumps(objective)) == objective == copy.deepcopy(objective)
    assert len({objective, Objective(**objective.settings())}) == 1
    assert objective != Objective()


def test_import_path_values_carry_their_own_parameters():
    objective = Objective(weight={"name": "my_package.weights:soft", "tau": 2})
    assert objective.weight == "my_package.weights:soft"
    assert objective.arguments("weight") == {"tau": 2}
    assert Objective(**objective.settings()) == objective
    assert objective.canonical()["weight.tau"] == 2


@given(AXIS_VALUES)
def test_settings_round_trip_and_canonical_settings_describe_the_same_algorithm(values):
    objective = Objective(**values)
    assert Objective(**objective.settings()) == objective
    for on_policy in (False, True):
        canonical = objective.canonical(on_policy)
        again = Objective(
            **{key.split(".")[-1]: value for key, value in {"ratio": "none", "weight": "one", **canonical}.items()}
        )
        assert again.canonical(on_policy) == canonical


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (dict(placement="none", estimator="k1"), dict(placement="none", estimator="full")),
        (dict(placement="log_ratio", estimator="k1"), dict(placement="log_ratio")),
        (dict(beta=0.0), dict(placement="none")),
        (dict(weight="one", ratio="token"), dict(weight="ppo_clip", ratio="none")),
        (dict(weight="one", ratio="sequence_mean"), dict(weight="one", ratio="none", path="ratio")),
        (dict(path="ratio"), dict(path="score")),
        (dict(ratio="none", placement="loss_corrected"), dict(ratio="none", placement="loss")),
        (dict(ratio="none", placement="loss_reweighted"), dict(ratio="none", placement="loss")),
        (dict(advantage="positive", placement="reward", estimator="k1"), dict(advantage="positive", placement="none")),
        (dict(advantage="positive", placement="reward_and_loss"), dict(advantage="positive", placement="loss")),
        (
            dict(estimator="full", placement="reward", kl_at="rollout"),
            dict(estimator="full", placement="reward", kl_at="current"),
        ),
    ],
)
def test_the_same_algorithm_has_one_canonical_form(one, other):
    assert Objective(**one).canonical() == Objective(**other).canonical()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (dict(weight="one", ratio="token", path="score"), dict(weight="one", ratio="sequence_mean", path="ratio")),
        (dict(weight="one", placement="loss_corrected"), dict(weight="one", placement="loss")),
        (dict(weight="one", placement="loss_reweighted"), dict(weight="one", placement="loss")),
        (dict(ratio="none", weight="mask", low=1.5), dict(ratio="none", weight="one")),
        (dict(ratio="none", weight="my.own:weight"), dict(ratio="none", weight="one")),
        (dict(advantage="positive", placement="advantage"), dict(advantage="positive", placement="none")),
    ],
)
def test_different_algorithms_keep_different_forms(one, other):
    assert Objective(**one).canonical() != Objective(**other).canonical()


def test_on_policy_the_ratio_the_weight_and_the_path_are_idle():
    forms = {
        str(Objective(ratio=ratio, weight=weight).canonical(on_policy=True))
        for ratio in AXES["ratio"].values
        for weight in AXES["weight"].values
    }
    assert len(forms) == 2  # Clip-Cov drops tokens whatever their ratios are
    corrected = {
        str(Objective(ratio=ratio, placement="loss_corrected").canonical(on_policy=True))
        for ratio in AXES["ratio"].values
    }
    assert len(corrected) == len(AXES["ratio"].values), "ρ is differentiated there, on-policy too"


def test_the_reason_of_idleness_is_told():
    idle = Objective(weight="one", placement="none").canonical_form().idle
    assert idle["ratio"] == "the weight is one"
    assert idle["estimator"] == "placement none has no KL term"


def test_beside_the_advantage_positive_a_kl_in_the_returns_is_idle_with_all_its_parameters():
    inside = Objective(advantage="positive", placement="reward").canonical_form().idle
    assert {"placement", "beta", "kl_scale", "kl_at"} <= set(inside)
    both = Objective(advantage="positive", placement="reward_and_loss", beta=0.3).canonical_form()
    assert both.canonical["placement"] == "loss"
    assert both.canonical["placement.beta"] == 0.3
    assert {"kl_scale", "kl_at"} <= set(both.idle)
    assert "beta" not in both.idle


def test_terms_of_the_loss_belong_to_no_axis_and_are_left_out_where_they_do_nothing():
    plain, bonus = Objective(), Objective(entropy_bonus=0.01, entropy_share=0.2)
    assert Objective(entropy_bonus=0.0, entropy_share=1.0) == plain
    assert "entropy_bonus" not in plain.settings()
    assert plain.canonical_text() == Objective(entropy_bonus=0).canonical_text()
    assert bonus.terms == {"entropy_bonus": 0.01, "entropy_share": 0.2}
    assert bonus.canonical() == {**plain.canonical(), **bonus.terms}
    assert Objective(**bonus.settings()) == bonus != plain
    assert bonus == Objective(entropy_share=0.2, entropy_bonus=0.01)
    for wrong in ({"entropy_bonus": -1.0}, {"entropy_share": 1.5}, {"entropy_share": "some"}):
        with pytest.raises(UserError, match="entropy"):
            Objective(**wrong)
    with pytest.raises(UserError, match="cov_low must be below cov_high"):
        Objective(weight="clip_cov", cov_low=6.0)
