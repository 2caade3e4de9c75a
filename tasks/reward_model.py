"""Reward models: a sequence classifier with one output, whose logit is the reward.

Input is the reward model's own chat template where its tokenizer has one (the prompt as the user's turn, the completion
as the assistant's), else prompt and completion one after the other; what is too long loses its beginning.

Completions are read several at a time, texts of similar length together, padded at the right. Which ones go together is
a function of the texts alone, so the same texts have the same rewards, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from klab.grid.errors import UserError
from klab.tasks.task import Example
from klab.tasks.verdict import Verdict

ROWS, TOKENS = 32, 16_384
"""Most texts, and most tokens with padding, that go through the model at once."""


@lru_cache(maxsize=4)
def reward_model(checkpoint: str) -> RewardModel:
    """The reward model of a checkpoint, loaded once per process."""
    return RewardModel(checkpoint)


class RewardModel:
    """Scores completions, on the GPU where there is one.

    Args:
        checkpoint: folder or hub id of a sequence classifier in safetensors format.

    Raises:
        UserError: there is no such checkpoint, it is not in safetensors format, or it has several outputs.
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
            raise UserError(
                f"no reward model could be loaded: {_first_line(error)}", key="task.reward.model", value=checkpoint
            ) from error
        if report["missing_keys"]:
            raise UserError(
                f"not a sequence classifier: the checkpoint has no {sorted(report['missing_keys'])[0]}",
                key="task.reward.model",
                value=checkpoint,
            )
        if model.config.num_labels != 1:
            raise UserError(
                f"a reward model has one output, this one has {model.config.num_labels}",
                key="task.reward.model",
                value=checkpoint,
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        positions = getattr(model.config, "max_position_embeddings", None)
        self.longest = min(self.tokenizer.model_max_length, positions or self.tokenizer.model_max_length)

    def __call__(self, example: Example, completion: str) -> Verdict:
        return next(self.verdicts([example], [completion]))

    def verdicts(self, examples: Sequence[Example], completions: Sequence[str]) -> Iterator[Verdict]:
        """The verdict on each completion, in order; a batch is computed when the first of its completions is due."""
        texts = [
            encoded(self.tokenizer, self.longest, example.prompt, completion)
            for example, completion in zip(examples, completions, strict=True)
        ]
        rows = ROWS if self.model.config.pad_token_id is not None else 1  # transformers would not know where texts end
        batch_of = {text: batch for batch in batches([len(text) for text in texts], rows) for text in batch}
        known: dict[int, float] = {}
        for place in range(len(texts)):
            if place not in known:
                batch = batch_of[place]
                known.update(zip(batch, self._logits([texts[text] for text in batch]), strict=True))
            yield Verdict(known[place])

    def _logits(self, texts: Sequence[list[int]]) -> list[float]:
        import torch

        width, padding = max(map(len, texts)), self.model.config.pad_token_id
        rows = [[*text, *[padding] * (width - len(text))] for text in texts]
        attended = [[1] * len(text) + [0] * (width - len(text)) for text in texts]
        with torch.no_grad():
            logits = self.model(
                input_ids=torch.tensor(rows, device=self.device),
                attention_mask=torch.tensor(attended, device=self.device),
            ).logits
        return [float(value) for value in logits[:, 0].float().tolist()]


def encoded(tokenizer: Any, longest: int, prompt: str, completion: str) -> list[int]:
    """The tokens that a reward model reads of a completion."""
    text, special = prompt + completion, True
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        text, special = tokenizer.apply_chat_template(turns, tokenize=False), False
    return list(tokenizer(text, add_special_tokens=special, truncation=True, max_length=longest)["input_ids"])


def batches(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Which texts go through the model together: at most `rows` neighbours by length.

    Args:
        lengths: tokens of each text.
    """
    found: list[list[int]] = []
    for text in sorted(range(len(lengths)), key=lengths.__getitem__):
        last = found[-1] if found else None
        if last is not None and len(last) < rows and (len(last) + 1) * lengths[text] <= TOKENS:
            last.append(text)
        else:
            found.append([text])
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
