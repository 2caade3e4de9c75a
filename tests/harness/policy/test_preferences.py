"""Proxy tasks: reward models that learn from pairs which the gold reward ranked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from klab.grid import UserError, parse_grid
from klab.harness.cli.main import main
from klab.harness.policy.init.initial_policy import initial_policy, policy_digest
from klab.harness.policy.load import load_policy
from klab.harness.policy.preferences import attach_reward_model, preference_model
from klab.harness.store import Run
from klab.reports import load_run, render
from klab.tasks import load_task
from klab.tasks.proxy import Proxy

GRID = {
    "name": "over",
    "task": {"name": "proxy", "gold": {"name": "addition", "digits": 1}, "pairs": 48, "hidden": 16, "epochs": 10},
    "policy": {"name": "tiny", "hidden": 16, "layers": 1, "heads": 2, "intermediate": 32, "warmup_accuracy": 0.25},
    "training": {"updates": 4, "prompts": 4, "group_size": 4, "evaluate_every": 2, "evaluation_prompts": 16},
    "objective": {"algorithm": "grpo", "beta": 0.05},
}


def cell(**task):
    data = {**GRID, "task": {**GRID["task"], **task}}
    return parse_grid(yaml.safe_dump(data), "over.yaml").cells[0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@pytest.fixture(scope="module")
def start(cache: Path) -> Path:
    made = cell()
    return initial_policy(made.policy, load_task(made.task), made.task, cache)


def test_the_reward_is_the_scaled_logit_and_gold_judges(cache: Path, start: Path) -> None:
    made = cell()
    task = load_task(made.task)
    assert isinstance(task, Proxy)
    example = task.split("held_out")[0]
    before = task.score(example, example.answer)
    assert (before.reward, before.correct) == (1.0, True), "the warm-up is on the gold reward"
    found = attach_reward_model(task, made.task, made.policy, start, 0, cache)
    assert found is not None
    right, wrong = task.score_all([example, example], [example.answer, "+"])
    assert right.correct
    assert not wrong.correct
    assert (right.parts["gold"], wrong.parts["gold"]) == (1.0, 0.0)
    assert right.reward == right.parts["proxy"]

    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(found.folder)
    tokens = AutoTokenizer.from_pretrained(found.folder)(example.prompt + example.answer, return_tensors="pt")
    logit = model(tokens["input_ids"]).logits[0, 0].item()
    assert right.reward == pytest.approx((logit - found.logits.mean) / found.logits.deviation, abs=1e-5)
    standardised = (1.0 - found.gold.mean) / found.gold.deviation
    assert right.parts["gap"] == pytest.approx(right.reward - standardised, abs=1e-12)
    assert 0 < found.gold.mean < 0.5, "the share of right answers of the starting policy"
    assert found.gold.deviation == pytest.approx((found.gold.mean * (1 - found.gold.mean)) ** 0.5, abs=1e-9)


def test_it_ranks_its_own_pairs_as_gold_does_and_is_the_same_when_made_again(
    cache: Path, start: Path, tmp_path: Path
) -> None:
    made = cell(pairs=200, hidden=32, epochs=40)
    task = load_task(made.task)
    found = preference_model(task, made.task, made.policy, start, cache)
    record = json.loads((found.folder / "preferences.json").read_text())
    assert record["loss"] < 0.3, "a model with parameters enough learns its 200 pairs"
    assert found.agreement is not None
    again = preference_model(load_task(made.task), made.task, made.policy, start, tmp_path)
    assert (again.folder / "model.safetensors").read_bytes() == (found.folder / "model.safetensors").read_bytes()
    assert (again.logits, again.gold, again.agreement) == (found.logits, found.gold, found.agreement)


def test_logits_have_mean_0_and_deviation_1_over_the_starting_policy(cache: Path, start: Path) -> None:
    made = cell()
    task = load_task(made.task)
    attach_reward_model(task, made.task, made.policy, start, 0, cache)
    from klab.harness.policy.preferences import _completions

    policy = load_policy(made.policy, start, 1, "cpu")
    drawn = [_completions(task, policy, "held_out", 0, number) for number in range(4)]
    rewards = [score.reward for examples, texts in drawn for score in task.score_all(examples, texts)]
    assert np.mean(rewards) == pytest.approx(0.0, abs=0.2)
    assert np.std(rewards) == pytest.approx(1.0, abs=0.2)


def test_proxies_of_one_task_start_from_the_policy_that_the_task_itself_starts_from() -> None:
    plain = parse_grid(yaml.safe_dump({**GRID, "task": {"name": "addition", "digits": 1}}), "plain.yaml").cells[0]
    digests = {policy_digest(each.policy, each.task) for each in (plain, cell(), cell(pairs=500), cell(hidden=64))}
    assert len(digests) == 1


def test_a_starting_policy_whose_completions_never_differ_is_refused(
    cache: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cell()
    task = load_task({"name": "proxy", "gold": {"name": "addition", "digits": 1}})
    monkeypatch.setattr("klab.harness.policy.preferences.MOST_DRAWS", 1)
    section = made.task.model_copy(update={"pairs": 100_000})
    with pytest.raises(UserError, match=r"task\.pairs: only \d+ of 64 prompts have two completions"):
        preference_model(task, section, made.policy, start, cache)


def test_a_grid_of_proxies_from_launch_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "over.yaml"
    file.write_text(yaml.safe_dump({**GRID, "axes": {"placement": ["loss", "none"]}, "seeds": 2}))
    assert main(["launch", str(file), "--on", "here"]) == 0
    run = Run.open(tmp_path / "runs" / "over")
    assert len(list(run.policies.glob("reward-*/preferences.json"))) == 1, "trained once, for all cells"
    for identity in run.cells:
        rows = run.cell(identity).evaluations()
        assert [set(row["parts"]) for row in rows] == [{"proxy", "gold", "gap"}] * 3
        assert all(row["reward"] == pytest.approx(row["parts"]["proxy"], abs=1e-6) for row in rows)
        assert run.cell(identity).result()["state"] == "finished"
    page = render(run.path, tmp_path / "out", scores=["parts.gold", "reward"]).read_text()
    assert "Proxy and gold reward along training" in page
    assert load_run(run.path).tasks == ("proxy(addition(digits=1))",)


def test_the_command_makes_what_a_launch_then_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "over.yaml"
    task = {**GRID["task"], "proxy_seed": None}
    cells = [{}, {"placement": "none"}, {"task.hidden": 8, "task.proxy_seed": 7}]
    data = {**GRID, "task": task, "design": "list", "cells": cells, "seeds": 2}
    file.write_text(yaml.safe_dump({**data, "training": {**GRID["training"], "updates": 1}}))
    assert main(["reward-model", str(file), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["hidden"], row["seed"], row["pairs"], row["new"]) for row in rows] == [
        (16, 0, 48, True),
        (16, 1, 48, True),
        (8, 7, 48, True),
    ], "one for every seed where the seed is the cell's, and one for all where it is given"
    assert all(0 <= row["accuracy"] <= 1 and 0 <= row["agreement"] <= 1 for row in rows)
    assert rows[0]["parameters"] == rows[1]["parameters"] > rows[2]["parameters"] > 0
    kept = {row["folder"]: (tmp_path / row["folder"] / "model.safetensors").stat().st_mtime_ns for row in rows}

    assert main(["launch", str(file), "--on", "here"]) == 0
    run = Run.open(tmp_path / "runs" / "over")
    assert {str(path.relative_to(tmp_path)) for path in run.policies.glob("reward-*") if path.is_dir()} == set(kept)
    assert all((tmp_path / name / "model.safetensors").stat().st_mtime_ns == made for name, made in kept.items())
    parts = [run.cell(identity).evaluations()[0]["parts"] for identity in run.cells]
    by_seed = {(run.resolved(identity)["seed"]): part["proxy"] for identity, part in zip(run.cells, parts, strict=True)}
    assert len(set(by_seed.values())) == 2, "another reward model, another proxy of the same starting policy"

    capsys.readouterr()
    assert main(["reward-model", str(file)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("found") == 3
    assert all(Path(name).name in shown for name in kept)


def test_the_command_refuses_a_grid_without_reward_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text(yaml.safe_dump({**GRID, "task": "addition"}))
    assert main(["reward-model", str(file)]) == 2
    assert "no cell of this grid has a reward model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"gold": "gsm8k"}, r"task\.gold: not a task whose reward is known exactly"),
        ({"gold": "adition"}, r"task\.gold.*did you mean 'addition'"),
        ({"gold": {"name": "addition", "digit": 1}}, r"task\.gold.*did you mean 'digits'"),
        ({"gold": {"name": "addition", "digits": 99}}, r"task\.gold"),
        ({"pairs": 0}, r"task\.pairs"),
        ({"hidden": 20}, r"task\.hidden"),
    ],
)
def test_a_proxy_that_cannot_be(task: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cell(**task)


def test_scores_do_not_depend_on_what_else_is_drawn(cache: Path, start: Path) -> None:
    made = cell()
    first = torch.random.get_rng_state()
    preference_model(load_task(made.task), made.task, made.policy, start, cache / "fresh")
    assert torch.equal(torch.random.get_rng_state(), first), "the generator of the process stays as it was"


def test_gold_beside_any_reward_is_a_term_of_weight_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sums = [{"question": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(10) for b in range(10)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    (tmp_path / "mine.py").write_text("def longer(completion):\n    return len(completion) / 4\n")
    terms = ["./mine.py:longer", {"name": "exact", "weight": 0.0, "part": "gold"}]
    task = {"name": "file", "path": "sums.jsonl", "prompt": "question", "answer": "answer", "reward": terms}
    training = {**GRID["training"], "lr": 0.01, "updates": 8}
    data = {
        **GRID,
        "task": {**task, "max_new_tokens": 4, "alphabet": "0123456789+=", "solution": "answer"},
        "training": training,
        "seeds": 2,
    }
    (tmp_path / "fooled.yaml").write_text(yaml.safe_dump({**data, "objective": {"algorithm": "rloo", "beta": 0.01}}))
    assert main(["launch", "fooled.yaml", "--on", "here"]) == 0
    run = Run.open(tmp_path / "runs" / "over")
    for identity in run.cells:
        rows = run.cell(identity).evaluations()
        assert all(set(row["parts"]) == {"longer", "gold"} for row in rows)
        assert all(row["reward"] == pytest.approx(row["parts"]["longer"], abs=1e-9) for row in rows), "gold weighs 0"
        assert rows[-1]["reward"] > rows[0]["reward"]
        assert rows[-1]["parts"]["gold"] < rows[0]["parts"]["gold"], "longer answers are wrong answers"
    page = render(run.path, tmp_path / "out", scores=["parts.gold"], figures=False).read_text()
    assert "Proxy and gold reward along training" in page
    (row,) = pd.read_csv(tmp_path / "out" / "tables" / "over_optimisation.csv").to_dict("records")
    assert row["gold_lost"] > 0
    assert np.isnan(row["gap_final"]), "how both scale is known of reward models that klab trained"
