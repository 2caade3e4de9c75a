"""The same formula as LaTeX, as text and as MathML."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from klab.grid import Objective, UserError
from klab.grid.algorithms import algorithm_names, load_algorithm
from klab.grid.catalogue import AXES
from klab.grid.formula import align, aligned, ascii_only, formula, to_latex, to_mathml, to_text
from klab.grid.formula.notation import equations, parse
from klab.grid.schema.training import TrainingSection

OFF_POLICY = TrainingSection(updates_per_rollout=2)


def sides(name: str) -> list[str]:
    """Both sides of every equation of a named algorithm."""
    made = formula(Objective(**load_algorithm(name).objective), training=OFF_POLICY)
    return [side for pair in made.pairs for side in pair]


def _same_when_read_again(latex: str) -> bool:
    printed = re.sub(r"\\(left|right)(?![a-z])", "", to_latex(latex)).replace(r"\text{if }", "")
    return parse(printed) == parse(latex)


@pytest.mark.parametrize("axis", AXES)
def test_printed_values_are_read_as_the_formulas_that_they_were_printed_from(axis: str) -> None:
    for value in AXES[axis].values.values():
        texts = [value.latex, value.gradient, *(text for pair in value.estimates.values() for text in pair)]
        assert all(_same_when_read_again(right) for text in texts if text for _, right in equations(text))


@pytest.mark.parametrize("name", algorithm_names())
def test_printed_algorithms_are_read_as_the_formulas_that_they_were_printed_from(name: str) -> None:
    assert all(_same_when_read_again(side) for side in sides(name))


@pytest.mark.parametrize("name", algorithm_names())
def test_every_algorithm_is_printed_in_text_ascii_and_mathml(name: str) -> None:
    made = formula(Objective(**load_algorithm(name).objective), training=OFF_POLICY)
    for side in sides(name):
        assert "\\" not in to_text(side)
        assert "?" not in ascii_only(to_text(side))
    tree = ElementTree.fromstring(aligned(made.pairs))
    assert len(tree.findall("./math")) == 2 * len(made.pairs)
    assert "\\" not in "".join(tree.itertext())
    text = align(made.pairs)
    assert text.startswith("\\begin{align}\n  L &= ")
    assert text.count(r"\left") - text.count(r"\left\{") == len(re.findall(r"\\right(?![a-z])", text))
    assert text.count("{") == text.count("}")


def test_text_is_what_a_reader_of_the_catalogue_expects() -> None:
    assert to_text(r"\frac{1}{H - j + 1} \sum_{i=j}^{H} \lambda_{i}") == "(1/(H − j + 1)) Σ_{i=j}^H λ_i"
    assert to_text(r"e^{-\kappa_{j}} - 1 + \kappa_{j}^{2}") == "e^{−κ_j} − 1 + κ_j²"
    assert to_text(r"\pi_{j}^{\mathrm{old}} \log \frac{a}{b}") == "π_old,j·log(a/b)"
    assert to_text(r"\begin{cases} 1 & R > 0 \\ -x & \text{otherwise} \end{cases}") == "{1 if R > 0; −x otherwise}"
    assert ascii_only("λ_j ≤ ε·∇ℓ_j²") == "lambda_j <= eps*grad logp_j^2"


def test_brackets_grow_around_what_is_tall() -> None:
    assert to_latex(r"(\frac{a}{b})") == r"\left( \frac{a}{b} \right)"
    assert to_latex("(a)") == "(a)"
    assert 'stretchy="true"' in to_mathml(r"(\frac{a}{b})")
    assert 'stretchy="false"' in to_mathml("(a)")


def test_mathml_puts_limits_below_sums_and_indices_beside_letters() -> None:
    tree = ElementTree.fromstring(to_mathml(r"\sum_{i=1}^{H} \lambda_{i}"))
    assert [child.tag for child in tree[0]] == ["munderover", "msub"]
    assert ElementTree.fromstring(to_mathml(r"\operatorname{a<b}")).itertext()


def test_settings_without_effect_do_not_appear() -> None:
    on_policy = formula(Objective(), on_policy=True)
    lefts = [left for left, _ in on_policy.pairs]
    assert r"\rho_{j}" not in lefts
    assert "w_{j}" not in lefts
    assert any("every ratio is 1" in remark for remark in on_policy.remarks)
    assert formula(Objective(beta=0.0)).pairs == formula(Objective(placement="none")).pairs
    assert (
        formula(Objective(weight="two_sided_clip", ceiling=3.0)).pairs == formula(Objective(weight="dual_clip")).pairs
    )


@pytest.mark.parametrize("name", algorithm_names())
def test_a_named_algorithm_is_nearest_to_itself(name: str) -> None:
    algorithm = load_algorithm(name)
    training = TrainingSection(**({"updates_per_rollout": 2} | algorithm.training))
    found = formula(Objective(**algorithm.objective), training=training).nearest
    assert found.differences == ()
    assert Objective(**found.algorithm.objective).canonical() == Objective(**algorithm.objective).canonical()


def test_differences_from_the_nearest_algorithm_are_named() -> None:
    near = formula(Objective(beta=0.5, estimator="k2")).nearest
    assert near.algorithm.name == "grpo"
    assert near.differences == ("estimator: k2 instead of k3", "beta: 0.5 instead of 0.04")
    assert formula(Objective(divergence="forward")).nearest.differences == ("divergence: forward instead of reverse",)
    assert formula(Objective(placement="reward")).nearest.algorithm.name == "grpo"
    dapo = Objective(**load_algorithm("dapo").objective)
    without = formula(dapo, training=OFF_POLICY).nearest
    assert without.algorithm.name == "dapo"
    assert "training.equal_groups: keep instead of refill" in without.differences


def test_numbers_are_explained_with_their_values_and_every_other_symbol_by_the_glossary() -> None:
    found = {symbol.text: symbol for symbol in formula(Objective(beta=0.3), training=OFF_POLICY).symbols}
    assert found["β"].value == 0.3
    assert found["ρ"].meaning == "importance ratio"
    assert found["ε_low"].latex == r"\varepsilon_{\mathrm{low}}"


def test_functions_of_the_users_own_are_named_with_their_import_paths() -> None:
    objective = Objective(
        estimator="mine:huber",
        placement="mine:final_reward",
        ratio="mine:half",
        weight={"name": "./weights.py:soft", "tau": 2.0},
        advantage="mine:above_greedy",
        aggregation="mine:per_root",
        path="mine:average",
    )
    made = formula(objective, training=OFF_POLICY)
    text = {to_text(left): to_text(right) for left, right in made.pairs}
    assert text["w_j"] == "soft(ρ_j, A_j)"
    assert text["φ_j"] == "huber(κ_j)"
    assert text["L"] == "−per_root(sg[w_j·A_j]·average(ℓ_j, log ρ_j) − final_reward_loss,j(φ, log ρ))"
    assert r"\operatorname{final\_reward}" in align(made.pairs)
    meanings = {symbol.text: symbol.meaning for symbol in made.symbols}
    assert meanings["soft"] == "your weight ./weights.py:soft with tau = 2.0"
    assert any("linear" in remark for remark in made.remarks)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"beta_control": {"target": 0.1}}, "β follows a KL target of 0.1 nats per token"),
        ({"beta_control": {"schedule": "cosine", "end": 0.01}}, "β goes from the given to 0.01 by the last update"),
        ({"beta_control": {"schedule": "linear", "updates": 9}}, "β goes from the given to 0 by update 9 (linear)"),
        ({"reference": {"update_every": 100}}, "π_ref is set to π after every 100 updates"),
        (
            {"reference": {"ema": 0.75}},
            "each weight of π_ref becomes 0.75 of itself and 0.25 of π's after every update",
        ),
        ({"trust_region": {"target": 0.5}}, "β_tr follows a KL target of 0.5"),
        ({"sampler": {"correction": "ratio"}}, "π_old is the sampler"),
        (
            {"entropy_control": {"target": 0.2}},
            "c_H rises by 0.005 after every update whose entropy was at or below 0.2",
        ),
        ({"behaviour": "reference"}, "π_old is the reference policy"),
        ({"truncated": "mask"}, "truncated trajectories"),
        ({"equal_groups": "drop"}, "groups of equal rewards are left out"),
    ],
)
def test_what_the_equations_do_not_show_is_said(setting: dict[str, object], said: str) -> None:
    made = formula(Objective(), training=TrainingSection(**({"updates_per_rollout": 2} | setting)))
    assert any(said in remark for remark in made.remarks)


def test_a_reference_that_drew_the_rollout_is_the_behaviour_policy() -> None:
    made = formula(Objective(), training=TrainingSection(updates_per_rollout=2, reference="rollout"))
    assert (r"\ell_{j}^{\mathrm{ref}}", r"\ell_{j}^{\mathrm{old}}") in made.pairs
    assert made.nearest.algorithm.name == "grpo"


def test_an_unknown_value_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="ppo_clip"):
        formula(Objective(weight="ppo_clp"))
