"""Reward models: a sequence classifier with one output, whose logit is the reward.

Input is the reward model's own chat template where its tokenizer has one (the prompt as the user's turn, the completion
as the assistant's), else prompt and completion one after the other; what is too long loses its beginning.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from grid.mistake import Mistake
from tasks.task import Example
from tasks.verdict import Verdict


@lru_cache(maxsize=4)
def reward_model(checkpoint: str) -> RewardModel:
    """The reward model of a checkpoint, loaded once per process."""
    return RewardModel(checkpoint)


class RewardModel:
    """Scores one completion at a time, on the GPU where there is one.

    Args:
        checkpoint: folder or hub id of a sequence classifier in safetensors format.

    Raises:
        Mistake: there is no such checkpoint, it is not in safetensors format, or it has several outputs.
    """

    def __init__(self, checkpoint: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                checkpoint, use_safetensors=True, output_loading_info=True
            )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, truncation_side="left")
        except (OSError, ValueError) as error:
            raise Mistake(
                f"no reward model could be loaded: {_first_line(error)}", key="task.reward.model", value=checkpoint
            ) from error
        if report["missing_keys"]:
            raise Mistake(
                f"not a sequence classifier: the checkpoint has no {sorted(report['missing_keys'])[0]}",
                key="task.reward.model",
                value=checkpoint,
            )
        if model.config.num_labels != 1:
            raise Mistake(
                f"a reward model has one output, this one has {model.config.num_labels}",
                key="task.reward.model",
                value=checkpoint,
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        positions = getattr(model.config, "max_position_embeddings", None)
        self.longest = min(self.tokenizer.model_max_length, positions or self.tokenizer.model_max_length)

    def __call__(self, example: Example, completion: str) -> Verdict:
        import torch

        text, special = example.prompt + completion, True
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": completion}]
            text, special = self.tokenizer.apply_chat_template(turns, tokenize=False), False
        encoded = self.tokenizer(
            text, add_special_tokens=special, truncation=True, max_length=self.longest, return_tensors="pt"
        )
        tokens = {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return Verdict(float(self.model(**tokens).logits[0, 0]))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
