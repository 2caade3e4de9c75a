"""Checkpoints of several architectures train end to end on a dataset in GSM8K's format, whole or with adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from word_problems import CHARACTERS, problems

from klab.harness.policy.hf.policy import TransformersPolicy
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.harness.training.pack import Pack
from klab.harness.training.runner import prepare_cell
from tests.support.random_checkpoints import checkpoint
from tests.support.training_records import MakeRun, StopAfter, finished, numbers
from tests.support.transformers_tokenizer import character_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FAMILIES = ("Qwen2", "Llama", "GPT2", "Gemma")
TRAINING: dict[str, Any] = {
    "updates": 3,
    "prompts": 2,
    "group_size": 3,
    "updates_per_rollout": 2,
    "max_new_tokens": 5,
    "evaluate_every": 3,
    "evaluation_prompts": 1,
    "evaluation_samples": 1,
}
LORA = {"rank": 2, "alpha": 8.0}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints by family; Qwen2's tokenizer has a chat template, and `|` ends a turn of it as well."""
    folders: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in folders:
            tokenizer = character_tokenizer(CHARACTERS)
            if family == "Qwen2":
                tokenizer.chat_template = TEMPLATE
            folders[family] = checkpoint(tmp_path_factory.mktemp(family), family, tokenizer)
            if family == "Qwen2":
                ends = {"eos_token_id": [1, tokenizer.convert_tokens_to_ids("|")], "temperature": 0.1}
                (folders[family] / "generation_config.json").write_text(json.dumps(ends))
        return folders[family]

    return of


@pytest.fixture
def train(make_run: MakeRun, models: Callable[[str], Path], tmp_path: Path) -> Callable[..., Run]:
    """A run folder of one cell of a family on word problems; Qwen2's reward is a function in a process of its own."""

    def make(
        name: str,
        family: str,
        training: dict[str, Any] | None = None,
        seeds: int = 1,
        objectives: list[dict[str, Any]] | None = None,
        **policy: Any,
    ) -> Run:
        task = {"name": "word_problems:Problems", "path": str(problems(tmp_path / "data"))}
        if family == "Qwen2":
            task |= {"name": "gsm8k", "reward": "word_problems:letters"}
        task["prompt"] = "{question} Answer: "
        described = {"model": str(models(family)), **policy}
        return make_run(name, {**TRAINING, **(training or {})}, objectives, seeds, task, described)

    return make


def pack_of(run: Run) -> Pack:
    return Pack([prepare_cell(run, run.cell(identity))[0] for identity in run.cells])


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_resumes_and_leaves_what_transformers_loads(
    train: Callable[..., Run], models: Callable[[str], Path], family: str, lora: dict[str, Any] | None
) -> None:
    run, broken = (train(name, family, lora=lora) for name in ("through", "broken"))
    folder = finished(run).cell(run.cells[0])
    rows = folder.metrics()
    assert [row["update"] for row in rows] == [1, 2, 3]
    assert all(not row["nonfinite"] and 0 < row["reward_mean"] < 1 and row["gradient_norm"] > 0 for row in rows)
    assert rows[0]["k3"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["ratio_max"] > 1
    assert [row["reverse_kl"] > 1e-4 for row in folder.evaluations()] == [False, True]

    identity = broken.cells[0]
    assert run_cells(broken.path, [identity], stop=StopAfter(1)) == {identity: "interrupted"}
    assert run_cells(broken.path, [identity]) == {identity: "finished"}
    file = "model.safetensors" if lora is None else "adapter_model.safetensors"
    mine, theirs = (load_file(each.cell(identity).policy / file) for each in (run, broken))
    assert numbers(run, identity) == numbers(broken, identity)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())

    trained = pack_of(run)
    kind = StackedPolicy if family in ("Qwen2", "Llama") else TransformersPolicy
    assert type(trained.policy) is kind
    trained.policy.load(folder.policy, 0)
    trained.collect_due_rollouts()
    rollout = trained.pending[0][0].rollout
    found = token_scores(trained.policy, [rollout])[0].logp.detach()
    model = (AutoModelForCausalLM if lora is None else AutoPeftModelForCausalLM).from_pretrained(folder.policy)
    for i, tokens in enumerate(rollout.tokens):
        prompt, length = rollout.prompts[i // rollout.group_size], int(rollout.present[i].sum())
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens[:length].tolist()])).logits[0]
        logp = logits[len(prompt) - 1 : len(prompt) - 1 + length].log_softmax(-1)
        wanted = logp.gather(1, tokens[:length, None])[:, 0]
        torch.testing.assert_close(found[i, :length], wanted, rtol=0, atol=1e-4)


def test_the_stacked_decoder_and_transformers_train_alike(train: Callable[..., Run]) -> None:
    training = {"lr": 1e-4}
    stacked, general = (finished(train(name, "Llama", training, engine=name)) for name in ("stacked", "transformers"))
    pairs = zip(stacked.cell(stacked.cells[0]).metrics(), general.cell(general.cells[0]).metrics(), strict=True)
    for mine, theirs in pairs:
        for name in ("reward_mean", "tokens", "entropy", "k3", "ratio_max", "gradient_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name


@pytest.mark.bits
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_foreign_model_packed_is_alone(train: Callable[..., Run], lora: dict[str, Any] | None) -> None:
    packed, alone = (train(name, "GPT2", {"updates": 2}, seeds=2, lora=lora) for name in ("packed", "alone"))
    finished(packed)
    for identity in alone.cells:
        run_cells(alone.path, [identity])
        assert numbers(packed, identity) == numbers(alone, identity)
    first, second = (numbers(packed, identity)["metrics"][0]["loss"] for identity in packed.cells)
    assert first != second


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "a critic of its own": ({"critic": {"kind": "model"}}, {"advantage": "gae"}, {}),
    "a value head on adapters": ({"critic": {"kind": "head"}}, {"advantage": "gae"}, {"lora": LORA}),
    "bfloat16 and recomputed layers": (
        {"token_budget": 400},
        {},
        {"dtype": "bfloat16", "gradient_checkpointing": True},
    ),
    "another sampler": ({"sampler": {"dtype": "bfloat16", "correction": "tis"}}, {}, {"lora": LORA}),
    "groups drawn again": ({"equal_groups": "refill"}, {}, {}),
}


@pytest.mark.parametrize(("training", "objective", "policy"), SETTINGS.values(), ids=SETTINGS.keys())
def test_a_foreign_model_resumes_with_every_setting(
    train: Callable[..., Run], training: dict[str, Any], objective: dict[str, Any], policy: dict[str, Any]
) -> None:
    training = {**training, "updates": 2, "minibatches": 2, "updates_per_rollout": 1}
    through, broken = (
        train(name, "GPT2", training, objectives=[objective], **policy) for name in ("through", "broken")
    )
    identity = finished(through).cells[0]
    assert run_cells(broken.path, [identity], stop=StopAfter(1)) == {identity: "interrupted"}
    assert run_cells(broken.path, [identity]) == {identity: "finished"}
    assert numbers(through, identity) == numbers(broken, identity)
    assert all(row["gradient_norm"] > 0 for row in numbers(through, identity)["metrics"])


def test_a_chat_model_is_asked_in_its_template_and_ends_its_turns(train: Callable[..., Run]) -> None:
    pack = pack_of(train("chat", "Qwen2", {"max_new_tokens": 40, "prompts": 8}))
    tokenizer = pack.policy.tokenizer
    bar = tokenizer.convert_tokens_to_ids("|")
    assert pack.policy.eos_token_ids == {1, bar}
    pack.collect_due_rollouts()
    rollout = pack.pending[0][0].rollout
    texts = [tokenizer.decode(prompt) for prompt in rollout.prompts]
    assert all(text.startswith("[user]Tom has ") and text.endswith(" Answer: <end>[assistant]") for text in texts)
    last = [int(row[present][-1]) for row, present in zip(rollout.tokens, rollout.present, strict=True)]
    assert bar in last
    for token, row, truncated, text in zip(last, rollout.tokens, rollout.truncated, rollout.texts, strict=True):
        assert (token in (1, bar)) != bool(truncated)
        assert (row == bar).sum() + (row == 1).sum() == (0 if truncated else 1)
        assert "|" not in text

    pack = pack_of(train("plain", "Qwen2", chat_template="never"))
    pack.collect_due_rollouts()
    assert tokenizer.decode(pack.pending[0][0].rollout.prompts[0]).startswith("Tom has ")


def test_the_generation_configuration_goes_with_the_policy(
    train: Callable[..., Run], models: Callable[[str], Path]
) -> None:
    run = finished(train("run", "Qwen2", {"updates": 1}))
    saved = run.cell(run.cells[0]).policy / "generation_config.json"
    assert json.loads(saved.read_text()) == json.loads((models("Qwen2") / saved.name).read_text())


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_prompts_that_are_too_long_are_left_out(train: Callable[..., Run], family: str) -> None:
    run = train("some", family, {"max_prompt_tokens": 80, "prompts": 20})
    pack = pack_of(run)
    pack.collect_due_rollouts()
    lengths = {len(prompt) for prompt in pack.pending[0][0].rollout.prompts}
    member = pack.members[0]
    assert len(member.split("train")) == 8 < len(member.task.split("train")) == 12
    assert len(member.split("held_out")) == 2 < len(member.task.split("held_out")) == 4
    assert len(lengths) > 2
    assert max(lengths) <= 80
    none = train("none", family, {"max_prompt_tokens": 5})
    assert run_cells(none.path, none.cells) == {none.cells[0]: "failed"}
    assert "training.max_prompt_tokens: every prompt of the split 'held_out' is longer" in error_of(none)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_a_prompt_beyond_the_context_fails_before_the_first_update(train: Callable[..., Run], family: str) -> None:
    run = train("long", family, {"max_new_tokens": 150})
    assert run_cells(run.path, run.cells) == {run.cells[0]: "failed"}
    assert "a prompt of 128 tokens and 150 new ones exceed the model's context of 256" in error_of(run)
    assert "training.max_prompt_tokens: 107" in error_of(run)
    assert run.cell(run.cells[0]).metrics() == []
    shorter = train("shorter", family, {"max_new_tokens": 150, "max_prompt_tokens": 107, "updates": 1})
    finished(shorter)


def error_of(run: Run) -> str:
    """What is wrong, and nothing but that."""
    text = str(run.cell(run.cells[0]).error())
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]
