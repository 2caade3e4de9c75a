"""The starting policy: warmed up into its window, made once, found again by its content."""

from __future__ import annotations

import json
import multiprocessing
import os
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from klab.grid.errors import UserError
from klab.grid.schema.sections import AdditionTask, CustomTask, HfPolicy, TinyPolicy
from klab.harness.policy.init.initial_policy import initial_policy, policy_digest
from klab.harness.policy.init.sft_warmup import sampled_accuracy
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.tasks import Example, Score, load_task
from tests.support.tiny_policy import decoder

POLICY = TinyPolicy(hidden=16, layers=1, intermediate=16, heads=2, warmup_accuracy=0.25)
TASK = CustomTask(name="tests.harness.policy.test_initial_policy:Dice")


class Dice:
    """Solutions are one of three letters whatever the prompt; `a` is correct. A warmed-up policy is right a third of
    the time."""

    name, alphabet, max_new_tokens = "dice", "abc0123456789=", 2

    def split(self, name: str) -> list[Example]:
        return [Example(f"{i}=", "a", "abc"[sha256(bytes([i])).digest()[0] % 3]) for i in range(100, 200)] * 3

    def score(self, example: Example, completion: str) -> Score:
        return Score(float(completion == "a"), completion == "a")

    def respond(self, example: Example, transcript: str) -> str | None:
        return None


def built(cache: Path, policy: TinyPolicy = POLICY) -> Path:
    return initial_policy(policy, Dice(), TASK, cache)


def test_the_default_policy_learns_to_add(tmp_path: Path) -> None:
    folder = initial_policy(TinyPolicy(), load_task(AdditionTask()), AdditionTask(), tmp_path)
    assert 0.35 <= json.loads((folder / "warmup.json").read_text())["accuracy"] <= 0.5


def test_a_tiny_policy_ends_inside_its_window_and_is_made_once(tmp_path: Path) -> None:
    steps: list[tuple[int, int, float]] = []
    folder = initial_policy(POLICY, Dice(), TASK, tmp_path, lambda *step: steps.append(step))
    assert folder.parent == tmp_path
    record = json.loads((folder / "warmup.json").read_text())
    assert 0.25 <= record["accuracy"] <= 0.5
    assert steps[-1] == (record["updates"], POLICY.warmup_updates_max, record["accuracy"])

    policy, task = StackedPolicy.from_pretrained(folder), Dice()
    held_out = task.split("held_out")
    assert sampled_accuracy(policy, task, held_out[:256], 0) == record["accuracy"]
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 16

    before = (folder / "model.safetensors").stat()
    assert initial_policy(POLICY, Dice(), TASK, tmp_path, lambda *step: pytest.fail("built again")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


def test_the_address_is_the_content(tmp_path: Path) -> None:
    quick = POLICY.model_copy(update={"family": "qwen3"})
    first = built(tmp_path / "a", quick)
    assert built(tmp_path / "b", quick).name == first.name
    weights = [StackedPolicy.from_pretrained(tmp_path / side / first.name).parameters for side in ("a", "b")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    others = [POLICY, quick.model_copy(update={"warmup_seed": 1}), quick.model_copy(update={"warmup_accuracy": 0.3})]
    assert first.name not in {policy_digest(other, TASK) for other in others} | {policy_digest(quick, AdditionTask())}


def _build(cache: Path) -> str:
    torch.set_num_threads(1)
    return f"{os.getpid()} {built(cache)}"


def test_processes_that_ask_at_once_get_one_policy(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        answers = pool.map(_build, [tmp_path, tmp_path], chunksize=1)
    assert len({answer.split()[1] for answer in answers}) == 1
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [Path(answers[0].split()[1])]


def test_an_interrupted_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def interrupt(*step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        initial_policy(POLICY, Dice(), TASK, tmp_path, interrupt)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert (built(tmp_path) / "config.json").exists()


def test_a_warm_up_that_does_not_get_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"warmup_updates_max.*accuracy of 0\.0.*after 5 updates"):
        built(tmp_path, POLICY.model_copy(update={"warmup_updates_max": 5}))


class Mute:
    """A task without reference solutions, and, if so told, without an alphabet."""

    name, max_new_tokens = "mute", 2

    def __init__(self, alphabet: str | None) -> None:
        self.alphabet = alphabet

    def split(self, name: str) -> list[Example]:
        return [Example("a", "a")]

    def score(self, example: Example, completion: str) -> Score:
        return Score(0.0, False)

    def respond(self, example: Example, transcript: str) -> str | None:
        return None


@pytest.mark.parametrize(("alphabet", "message"), [("a", "reference solutions"), (None, "alphabet")])
def test_a_task_that_cannot_be_warmed_up_on_is_a_mistake(tmp_path: Path, alphabet: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        initial_policy(POLICY, Mute(alphabet), TASK, tmp_path)


def test_a_pretrained_folder_is_used_as_it_is(tmp_path: Path) -> None:
    decoder(1).save(tmp_path / "model", 0)
    section = HfPolicy(model=str(tmp_path / "model"))
    assert initial_policy(section, Dice(), TASK, tmp_path / "cache") == tmp_path / "model"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match=r"policy\.model: no such folder .*klab pretrain GRID --out"):
        initial_policy(HfPolicy(model=str(tmp_path / "nowhere")), Dice(), TASK, tmp_path)
