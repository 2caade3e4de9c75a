"""Reward models from preferences: pairs of completions of the starting policy, ranked by the gold reward.

The model is a sequence classifier of transformers with one output, of the starting policy's tokenizer, trained on the
likelihood of the choices under Bradley and Terry's model, −log σ(r(better) − r(worse)) (Ouyang et al. 2022, eq. 1).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from klab.grid.errors import UserError
from klab.harness.policy.init.initial_policy import initial_policy
from klab.harness.policy.init.sft_warmup import Progress as Warming
from klab.harness.policy.init.shared_folder import made_once
from klab.harness.policy.load import load_policy
from klab.harness.policy.policy import Policy
from klab.harness.policy.pretrained import read_tokenizer
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.tasks.proxy import Proxy, Scale
from klab.tasks.reward_model import encoded
from klab.tasks.task import Example, SplitName, Task, load_task

VERSION = 2
"""Version of the procedure, part of every digest."""

RECORD = "preferences.json"
_MEASURED = ("agreement", "parameters", "pairs", "accuracy", "seconds")
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 32, 1e-3, 1e-2
PROMPTS_AT_ONCE, SAMPLES = 64, 4
"""Prompts, and completions of each, that are drawn in one call while pairs are looked for."""
MOST_DRAWS = 400
"""Calls after which a starting policy is given up whose completions hardly ever differ in reward."""
CHECKED_PAIRS, CHECKED_DRAWS = 512, 40
"""Most pairs of held-out prompts, and calls to find them, on which the agreement with the gold reward is measured."""

Progress = Callable[[int, int, float], None]
"""`progress(epoch, epochs, loss)`."""


Text = tuple[str, str]
"""A prompt and a completion."""


class Pair(NamedTuple):
    """Two completions of one prompt, the one with the higher gold reward first."""

    example: Example
    better: str
    worse: str


@dataclass(frozen=True)
class PreferenceModel:
    """A trained reward model.

    Attributes:
        folder: a checkpoint of transformers.
        logits, gold: how its logits and the gold reward scale over completions of the starting policy.
        agreement: share of fresh pairs, of held-out prompts, that it ranks as the gold reward does; None where the
            starting policy's completions hardly ever differ.
        parameters: how many numbers were trained.
        pairs, accuracy: it learnt from so many pairs, and ranks this share of them as the gold reward does.
        seconds: that its making took.
    """

    folder: Path
    logits: Scale
    gold: Scale
    agreement: float | None
    parameters: int
    pairs: int
    accuracy: float
    seconds: float


def starting_point(
    section: Any, policy_section: Any, seed: int, cache: Path, progress: Warming | None = None
) -> tuple[Task, Path]:
    """A cell's task, ready to score, and the folder of the policy that it starts from; both are made unless the cache
    has them.

    Args:
        section: the grid's task section.
        policy_section: its policy section.
        seed: the cell's.
        cache: the folder of shared policies.
        progress: of a warm-up, as `initial_policy` takes it.

    Raises:
        UserError: as `load_task`, `initial_policy` and `attach_reward_model`.
    """
    task = load_task(section)
    start = initial_policy(policy_section, task, section, cache=cache, progress=progress)
    attach_reward_model(task, section, policy_section, start, seed, cache)
    return task, start


def attach_reward_model(
    task: Task,
    section: Any,
    policy_section: Any,
    start: str | Path,
    seed: int,
    cache: Path,
    progress: Progress | None = None,
) -> PreferenceModel | None:
    """Gives a proxy task its reward model, which is trained unless the cache has it; other tasks have none.

    Args:
        section: the grid's task section.
        policy_section: its policy section.
        start: the folder of the starting policy.
        seed: the cell's, which is the reward model's where `proxy_seed` is null.
        cache: the folder of shared policies, where the reward model is kept too.

    Raises:
        UserError: too few completions of the starting policy differ in their gold reward.
    """
    if not isinstance(task, Proxy):
        return None
    found = preference_model(task, section.of_cell(seed), policy_section, Path(start), cache, progress)
    task.attach(found.folder, found.logits, found.gold)
    return found


def preference_model(
    task: Proxy, section: Any, policy_section: Any, start: Path, cache: Path, progress: Progress | None = None
) -> PreferenceModel:
    """The reward model of a proxy task whose `proxy_seed` is a number; any number of processes may ask at once."""
    identity = {
        "version": VERSION,
        "task": section.model_dump(mode="json"),
        "policy": policy_section.model_dump(mode="json", exclude={"lora", "gradient_checkpointing"}),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = made_once(
        Path(cache) / f"reward-{digest}",
        RECORD,
        lambda scratch: _train(scratch, task, section, policy_section, start, identity, progress),
    )
    record = json.loads((folder / RECORD).read_text())
    measured = {name: record[name] for name in _MEASURED}
    return PreferenceModel(folder, Scale(**record["logits"]), Scale(**record["gold"]), **measured)


def _train(
    folder: Path,
    task: Proxy,
    section: Any,
    policy_section: Any,
    start: Path,
    identity: dict[str, Any],
    progress: Progress | None,
) -> None:
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    begun = time.monotonic()
    policy = load_policy(policy_section.model_copy(update={"lora": None}), start, 1, "cpu")
    train = _training_pairs(task, policy, section.pairs, section.proxy_seed)
    tokenizer = read_tokenizer(start)
    heads = max(1, section.hidden // 16)
    config = Qwen2Config(
        vocab_size=policy.vocab_size,
        hidden_size=section.hidden,
        intermediate_size=2 * section.hidden,
        num_hidden_layers=section.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=policy.config.max_position_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.proxy_seed)
        model: Any = Qwen2ForSequenceClassification(config)  # type: ignore[no-untyped-call]
        loss = _fit(model, tokenizer, train, section.epochs, section.proxy_seed, progress)
    model.eval().save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    fresh = _pairs(task, policy, "held_out", CHECKED_PAIRS, section.proxy_seed, CHECKED_DRAWS)
    drawn, texts = _completions(task, policy, "held_out", section.proxy_seed, 0)
    logits = _logits(model, tokenizer, [(example.prompt, text) for example, text in zip(drawn, texts, strict=True)])
    gold = torch.tensor([task.gold.score(*each).reward for each in zip(drawn, texts, strict=True)]).double()
    record = {
        **identity,
        "pairs": len(train),
        "loss": loss,
        "parameters": sum(each.numel() for each in model.parameters()),
        "accuracy": _agreement(model, tokenizer, train),
        "agreement": _agreement(model, tokenizer, fresh),
        "logits": _scale(logits),
        "gold": _scale(gold),
        "seconds": time.monotonic() - begun,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1))


def _scale(rewards: Tensor) -> dict[str, float]:
    deviation = float(rewards.std(correction=0))
    return {"mean": float(rewards.mean()), "deviation": deviation if deviation > 0 else 1.0}


def _training_pairs(task: Proxy, policy: Policy, count: int, seed: int) -> list[Pair]:
    found = _pairs(task, policy, "train", count, seed, MOST_DRAWS)
    if len(found) < count:
        raise UserError(
            f"only {len(found)} of {MOST_DRAWS * PROMPTS_AT_ONCE} prompts have two completions of the starting policy "
            "with different gold rewards",
            key="task.pairs",
            value=count,
            hint="Ask for fewer pairs, or warm the policy up to an accuracy nearer to a half.",
        )
    return found


def _pairs(task: Proxy, policy: Policy, split: SplitName, count: int, seed: int, draws: int) -> list[Pair]:
    """The first `count` pairs with different gold rewards that are met in so many draws, one of each drawn prompt."""
    found: list[Pair] = []
    for number in range(draws):
        examples, texts = _completions(task, policy, split, seed, number)
        for first in range(0, len(texts), SAMPLES):
            own, example = texts[first : first + SAMPLES], examples[first]
            rewards = [task.gold.score(example, text).reward for text in own]
            high, low = rewards.index(max(rewards)), rewards.index(min(rewards))
            if rewards[high] > rewards[low]:
                found.append(Pair(example, own[high], own[low]))
        if len(found) >= count:
            break
    return found[:count]


def _completions(
    task: Proxy, policy: Policy, split: SplitName, seed: int, number: int
) -> tuple[list[Example], list[str]]:
    """Examples, each `SAMPLES` times, and a completion of the starting policy for each."""
    examples = task.gold.split(split)
    generator = torch.Generator().manual_seed(_seed(split, seed, number))
    rows = torch.randint(len(examples), (PROMPTS_AT_ONCE,), generator=generator).tolist()
    chosen = [examples[row] for row in rows]

    def environment(cell: int, trajectory: int, transcript: str) -> str | None:
        return task.respond(chosen[trajectory // SAMPLES], transcript)

    rollout = sample(
        policy,
        [[policy.encode_prompt(example.prompt) for example in chosen]],
        [generator],
        SamplingOptions(group_size=SAMPLES, max_new_tokens=task.max_new_tokens),
        environment if task.interactive else None,
    )[0]
    return [example for example in chosen for _ in range(SAMPLES)], list(rollout.texts)


def _seed(split: str, seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"preferences {split} {seed} {number}".encode()).digest()[:7], "big")


def _agreement(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> float | None:
    """The share of pairs that the model ranks as the gold reward does, ties as half; None without pairs."""
    if not pairs:
        return None
    better = _logits(model, tokenizer, [(pair.example.prompt, pair.better) for pair in pairs])
    worse = _logits(model, tokenizer, [(pair.example.prompt, pair.worse) for pair in pairs])
    return float(((better > worse).double() + 0.5 * (better == worse).double()).mean())


def _fit(model: Any, tokenizer: Any, pairs: Sequence[Pair], epochs: int, seed: int, progress: Progress | None) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    mean = 0.0
    for epoch in range(epochs):
        losses = []
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for first in range(0, len(pairs), BATCH_SIZE):
            chosen = [pairs[row] for row in order[first : first + BATCH_SIZE]]
            texts = [(p.example.prompt, p.better) for p in chosen] + [(p.example.prompt, p.worse) for p in chosen]
            better, worse = _forward(model, tokenizer, texts).chunk(2)
            loss = torch.nn.functional.softplus(worse - better).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        if progress is not None:
            progress(epoch + 1, epochs, mean)
    return mean


@torch.no_grad()
def _logits(model: Any, tokenizer: Any, texts: Sequence[Text]) -> Tensor:
    return torch.cat([_forward(model, tokenizer, texts[row : row + 64]) for row in range(0, len(texts), 64)]).double()


def _forward(model: Any, tokenizer: Any, texts: Sequence[Text]) -> Tensor:
    rows = [encoded(tokenizer, model.config.max_position_embeddings, *text) for text in texts]
    width, padding = max(map(len, rows)), model.config.pad_token_id
    ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
    attended = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits: Tensor = model(input_ids=ids, attention_mask=attended).logits
    return logits[:, 0]
