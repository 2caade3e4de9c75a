"""One cell trained by TRL's GRPOTrainer, timed phase by phase: runs in the environment that holds TRL.

    PYTHONPATH=. .venv-parity/bin/python tests/benchmarks/trl_cell.py START --prompts 16 --budget 8 --updates 9 --out F

Nothing of TRL is replaced; clocks are wrapped around its methods. `bf16` and gradient checkpointing, which TRL switches
on by default, are off: a CPU computes neither faster.
"""

from __future__ import annotations

import time

STARTED = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import tempfile  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from setting import BETA, DIGITS, EPSILON, GROUP_SIZE, LEARNING_RATE, UPDATES_PER_ROLLOUT  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from tasks.addition import Addition  # noqa: E402


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds and processor seconds of every update, and of the phases inside."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []
        self.phases: Counter[str] = Counter()
        self.first: float | None = None
        self._last = _now()

    def around(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = _now()[1]
            try:
                return work(*args, **kwargs)
            finally:
                self.phases[phase] += _now()[1] - began

        return timed

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = _now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = _now()
        self.first = self.first or time.time()
        wall, cpu = now[0] - self._last[0], now[1] - self._last[1]
        self.updates.append({"wall": wall, "cpu": cpu, **self.phases})
        self.phases.clear()
        self._last = _now()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _watched(trainer: Any, clock: Clock) -> None:
    reference, scored = trainer.ref_model, trainer._get_per_token_logps_and_entropies

    def score(model: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return scored(model, *args, **kwargs)  # inside _compute_loss
        phase = "reference" if model is reference else "behaviour"
        return clock.around(phase, scored)(model, *args, **kwargs)

    trainer._get_per_token_logps_and_entropies = score
    trainer._generate = clock.around("rollout", trainer._generate)
    trainer._calculate_rewards = clock.around("reward", trainer._calculate_rewards)
    trainer._compute_loss = clock.around("forward", trainer._compute_loss)
    trainer.accelerator.backward = clock.around("backward", trainer.accelerator.backward)
    made = trainer.create_optimizer

    def create(*args: Any, **kwargs: Any) -> Any:
        optimizer = made(*args, **kwargs)
        optimizer.step = clock.around("step", optimizer.step)
        return optimizer

    trainer.create_optimizer = create


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("start", type=Path)
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = Addition(DIGITS)
    answers = {}

    def rows() -> Any:
        split = task.split("train")
        for number in range(given.prompts * given.updates):
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
        config = GRPOConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=given.prompts * GROUP_SIZE,
            gradient_accumulation_steps=1,
            num_generations=GROUP_SIZE,
            num_iterations=UPDATES_PER_ROLLOUT,
            max_completion_length=given.budget,
            max_steps=given.updates,
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
            seed=given.seed,
            logging_steps=1000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = Clock()
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(given.start, dtype=torch.float32),
            reward_funcs=reward,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(given.start),
            callbacks=[clock],
        )
        _watched(trainer, clock)
        trainer.train()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "first_update": (clock.first or time.time()) - STARTED,
        "process_wall": time.time() - STARTED,
        "process_cpu": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
        "updates": clock.updates,
        "rewards": rewards,
    }
    given.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
