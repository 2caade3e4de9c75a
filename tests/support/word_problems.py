"""A made dataset in GSM8K's format, and a reward that a random model earns some of."""

from __future__ import annotations

import json
import string
from pathlib import Path

from klab.tasks import Example, Score
from klab.tasks.gsm8k import Gsm8k

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"


def problems(folder: Path, longest: int = 9) -> Path:
    """`train.jsonl` with twelve problems and `test.jsonl` with four, of one to `longest` words."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(12)), ("test", range(12, 16))):
        rows = []
        for n in numbers:
            question = f"Tom has {n} eggs" + " and eats one" * (n % longest) + "."
            rows.append({"question": question, "answer": f"He has <<{n}-1={n - 1}>>{n - 1}.\n#### {n - 1}"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Problems(Gsm8k):
    """GSM8K as it is, but for the reward: that of `letters`, without a process of its own."""

    def score(self, example: Example, completion: str) -> Score:
        share = letters(example.prompt, completion, example.answer)
        return Score(share, share > 0.5)


def letters(prompt: str, completion: str, answer: str) -> float:
    """The share of the completion that is letters."""
    return sum(each.isalpha() for each in completion) / max(1, len(completion))
