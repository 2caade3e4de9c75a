"""`klab plan` says what a study can see, from which noise, and what nothing can decide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from klab.harness.cli.main import main

TEXT = """
name: seen
task: {name: addition, digits: 1}
policy: {name: tiny}
training: {updates: 2}
objective: {algorithm: grpo, beta: 0.05}
design: one_at_a_time
axes:
  estimator: [k1, k2, k3]
seeds: 5
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)

    def call(*options: str, text: str = TEXT) -> str:
        Path("seen.yaml").write_text(text)
        code = main(["plan", "seen.yaml", "--no-check", "--no-merge", *options])
        out = capsys.readouterr()
        return out.out if code == 0 else out.err

    return call


def test_the_detectable_difference_and_the_assumed_noise_are_printed(plan) -> None:
    out = plan("--detect", "0.03")
    assert "5 seeds find a difference of" in out
    assert "with power 0.8 (2 contrasts)" in out
    assert "a difference of 0.03 needs" in out
    assert "standard deviation of runs of one cell: 0.03 (assumed; --pilot RUN measures it)" in out


def test_programs_get_the_same_numbers(plan) -> None:
    seen = json.loads(plan("--json", "--detect", "0.03"))["sight"]
    twice = json.loads(plan("--json", "--detect", "0.03", "--sd", "0.06"))["sight"]
    assert twice["detectable_difference"] == pytest.approx(2 * seen["detectable_difference"])
    assert twice["detect"]["seeds"] > seen["detect"]["seeds"] > 5
    grown = json.loads(plan("--json", text=TEXT.replace("seeds: 5", f"seeds: {seen['detect']['seeds']}")))["sight"]
    assert grown["detectable_difference"] <= 0.03
    assert seen["warnings"] == []


def test_stated_contrasts_and_looks_change_what_is_seen(plan) -> None:
    plain, stated, looked = (
        json.loads(plan("--json", text=TEXT + section))["sight"]["detectable_difference"]
        for section in (
            "",
            "analysis: {contrasts: [{estimator: k1}]}\n",
            "analysis: {stop: {seeds: 10}}\n",
        )
    )
    assert stated < plain < looked


def test_axes_of_a_product_are_seen_apart(plan) -> None:
    text = TEXT.replace("one_at_a_time", "product").replace("[k1, k2, k3]", "[k3, k1]\n  training.lr: [1.0e-3, 1.0e-4]")
    text = text.replace("beta: 0.05}", "beta: 0.05, estimator: k3}").replace("updates: 2", "updates: 2, lr: 1.0e-3")
    out = plan(text=text)
    assert "by estimator alone" in out
    assert "by training.lr alone" in out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("seeds: 5", "seeds: 1"), "warning: one seed: no comparison can be decided"),
        (("seeds: 5", "seeds: 2"), "warning: two seeds are weak evidence"),
        (("one_at_a_time", "product"), None),
        (("design: one_at_a_time\naxes:\n  estimator: [k1, k2, k3]\n", ""), "warning: one configuration: there is"),
        (("[k1, k2, k3]", "[k1, k2]"), None),
    ],
)
def test_what_cannot_be_decided_is_said_beforehand(plan, change: tuple[str, str], said: str | None) -> None:
    out = plan(text=TEXT.replace(*change))
    assert (said in out) if said else ("warning" not in out)


def test_a_grid_without_its_baseline_decides_nothing(plan) -> None:
    text = TEXT.replace("one_at_a_time", "product").replace("[k1, k2, k3]", "[k1, k2]")
    out = plan("--detect", "0.03", text=text)
    assert "warning: no cell of this grid is the baseline" in out
    assert "seeds find" not in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--detect", "0"), "--detect: not a difference above 0"),
        (("--sd", "-1"), "--sd: not a number above 0"),
        (("--sd", "0.1", "--pilot", "x"), "Give --sd or --pilot, not both"),
        (("--pilot", "nowhere"), "there is no such run"),
    ],
)
def test_mistakes_are_named(plan, options: tuple[str, ...], said: str) -> None:
    assert said in plan(*options)
