"""GSM8K (Cobbe et al. 2021): grade-school word problems, with solutions that end in `#### n`."""

from __future__ import annotations

import re

from klab.tasks.file import File
from klab.tasks.worker import MEMORY_GB

HUB_ID, CONFIG = "openai/gsm8k", "main"
PROMPT = "{question}\nThink step by step and end with #### and the answer.\n"
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


class Gsm8k(File):
    """Its 7,473 training and 1,319 test problems, or another dataset with columns `question` and `answer`.

    Reference solutions are without the calculator annotations `<<48/2=24>>`.

    Args:
        path: see `klab.tasks.dataset.load_tables`.
        prompt: see `klab.tasks.file.Template`.
        reward, reward_seconds, reward_memory_gb: see `klab.tasks.rewards.Rewards`; by default `math`, with `format`
            reported beside it.

    Raises:
        UserError: see `klab.tasks.file.File`.
    """

    name = "gsm8k"

    def __init__(
        self,
        path: str = HUB_ID,
        prompt: str = PROMPT,
        reward: object = ("math", {"name": "format", "weight": 0.0}),
        reward_seconds: float = 10.0,
        reward_memory_gb: float | None = MEMORY_GB,
    ) -> None:
        super().__init__(
            path,
            prompt,
            answer="answer",
            solution="answer",
            config=CONFIG if path == HUB_ID else None,
            reward=reward,
            reward_seconds=reward_seconds,
            reward_memory_gb=reward_memory_gb,
            max_new_tokens=256,
        )

    def solution_of(self, text: str) -> str:
        return _ANNOTATION.sub("", text)
