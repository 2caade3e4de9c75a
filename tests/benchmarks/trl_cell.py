"""One cell trained by TRL's GRPOTrainer, timed phase by phase: runs in the environment that holds TRL.

    PYTHONPATH=. .venv-parity/bin/python tests/benchmarks/trl_cell.py START --prompts 16 --budget 8 --updates 9 --out F

Nothing of TRL is replaced; clocks are wrapped around its methods. Gradient checkpointing, which TRL switches on by
default, is off; so is `bf16` where weights are float32, as in the tiny setting: a CPU computes neither faster.
"""

from __future__ import annotations

import time

STARTED = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import tempfile  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from clock import CLOCKS, device_name, meet, usage, wall  # noqa: E402
from datasets import Dataset  # noqa: E402
from setting import (  # noqa: E402
    BETA,
    EPSILON,
    LEARNING_RATE,
    LORA_ALPHA,
    ROLLOUTS_DROPPED,
    UPDATES_PER_ROLLOUT,
    Setting,
    add_arguments,
    told,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from klab.tasks import load_task  # noqa: E402


class Watch(TrainerCallback):  # type: ignore[misc]
    """Seconds and processor seconds of every update, and seconds of the phases inside on the chosen clock.

    Attributes:
        trajectories: that went through the loss, by update.
        tokens: drawn, by rollout.
    """

    def __init__(self, clock: str, gather: Callable[[], None]) -> None:
        self.updates: list[dict[str, float]] = []
        self.phases: Counter[str] = Counter()
        self.trajectories: list[int] = []
        self.tokens: list[int] = []
        self.first: float | None = None
        self._clock, self._gather = CLOCKS[clock], gather
        self._last = _now()
        self._passed = 0

    def around(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self._clock()
            try:
                return work(*args, **kwargs)
            finally:
                self.phases[phase] += self._clock() - began

        return timed

    def passed(self, trajectories: int) -> None:
        self._passed += trajectories

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = _now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = _now()
        self.first = self.first or time.time()
        seconds, processor = now[0] - self._last[0], now[1] - self._last[1]
        self.updates.append({"wall": seconds, "cpu": processor, **self.phases})
        self.trajectories.append(self._passed)
        self._passed = 0
        self.phases.clear()
        if len(self.updates) == UPDATES_PER_ROLLOUT * ROLLOUTS_DROPPED:
            self._gather()
            now = _now()
        self._last = now


def _now() -> tuple[float, float]:
    return wall(), time.process_time()


def watched(trainer: Any, clock: Watch) -> None:
    reference, scored, drawn = trainer.ref_model, trainer._get_per_token_logps_and_entropies, trainer._generate
    adapted = [each for each in trainer.model.modules() if isinstance(getattr(each, "disable_adapters", None), bool)]

    def score(model: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # inside _compute_loss
            clock.passed(len(tokens))
            return scored(model, tokens, *args, **kwargs)
        # with adapters, the reference is the model with these switched off
        frozen = adapted[0].disable_adapters if adapted else model is reference
        return clock.around("reference" if frozen else "behaviour", scored)(model, tokens, *args, **kwargs)

    def generate(*args: Any, **kwargs: Any) -> Any:
        found = clock.around("rollout", drawn)(*args, **kwargs)
        clock.tokens.append(sum(map(len, found[1])))
        return found

    trainer._get_per_token_logps_and_entropies = score
    trainer._generate = generate
    trainer._calculate_rewards = clock.around("reward", trainer._calculate_rewards)
    trainer._compute_loss = clock.around("forward", trainer._compute_loss)
    trainer.accelerator.backward = clock.around("backward", trainer.accelerator.backward)
    made = trainer.create_optimizer

    def create(*args: Any, **kwargs: Any) -> Any:
        optimizer = made(*args, **kwargs)
        optimizer.step = clock.around("step", optimizer.step)
        return optimizer

    trainer.create_optimizer = create


def _config(setting: Setting, updates: int, seed: int, folder: str) -> GRPOConfig:
    rows = setting.rows or setting.trajectories
    return GRPOConfig(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=setting.dtype == "bfloat16",
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=setting.trajectories // rows,
        num_generations=setting.group_size,
        num_iterations=UPDATES_PER_ROLLOUT,
        max_completion_length=setting.new_tokens,
        max_steps=updates,
        beta=BETA,
        epsilon=EPSILON,
        loss_type="grpo",
        use_bias_correction_kl=False,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        temperature=1.0,
        seed=seed,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _adapters(setting: Setting) -> Any:
    if setting.lora_rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=setting.lora_rank, lora_alpha=LORA_ALPHA, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )


def measured(
    setting: Setting, trainer: GRPOTrainer, watch: Watch, rewards: list[float], started: float
) -> dict[str, Any]:
    """What a process of TRL's has measured since it started."""
    counted = watch.tokens[ROLLOUTS_DROPPED:]
    trainable = sum(value.numel() for value in trainer.model.parameters() if value.requires_grad)
    return {
        "first_update": (watch.first or time.time()) - started,
        "process_wall": time.time() - started,
        "updates": watch.updates,
        "trajectories": watch.trajectories,
        "tokens": sum(counted) / max(1, len(counted)),
        "adapter_numbers": 0 if setting.lora_rank is None else trainable,
        "rewards": rewards,
        "device": device_name(),
        **usage(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    setting = told(given)
    task = load_task(setting.task)
    answers = {}

    def rows() -> Any:
        split = task.split("train")
        for number in range(setting.prompts * given.updates):
            example = split[(given.seed * 100_003 + number) % len(split)]
            answers[example.prompt] = example
            yield {"prompt": example.prompt}

    data = Dataset.from_list(list(rows()))
    rewards: list[float] = []

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        found = [task.score(answers[p], c).reward for p, c in zip(prompts, completions, strict=True)]
        rewards.append(sum(found) / len(found))
        return found

    with tempfile.TemporaryDirectory() as scratch:
        watch = Watch(setting.clock, lambda: meet(given.meet, given.processes))
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(given.start, dtype=getattr(torch, setting.dtype)),
            reward_funcs=reward,
            args=_config(setting, given.updates, given.seed, scratch),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(given.start),
            callbacks=[watch],
            peft_config=_adapters(setting),
        )
        watched(trainer, watch)
        trainer.train()
    given.out.write_text(json.dumps(measured(setting, trainer, watch, rewards, STARTED)))


if __name__ == "__main__":
    main()
