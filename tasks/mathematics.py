r"""MATH (Hendrycks et al. 2021): competition problems, with solutions that end in `\boxed{…}`."""

from __future__ import annotations

from klab.tasks.file import File
from klab.tasks.worker import MEMORY_GB

HUB_ID, HELD_OUT_HUB_ID = "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500"
PROMPT = "{problem}\nThink step by step and put the answer in \\boxed{}.\n"


class Mathematics(File):
    """The 7,500 training problems, with MATH-500 (Lightman et al. 2023) held out.

    Args:
        path: another dataset with columns `problem` and `solution`, split as it is; see `dataset.load_tables`.
        prompt: see `klab.tasks.file.Template`.
        reward, reward_seconds, reward_memory_gb: see `klab.tasks.rewards.Rewards`; by default `math`, with `format`
            reported beside it.

    Raises:
        UserError: see `klab.tasks.file.File`.
    """

    name = "math"

    def __init__(
        self,
        path: str | None = None,
        prompt: str = PROMPT,
        reward: object = ("math", {"name": "format", "weight": 0.0}),
        reward_seconds: float = 10.0,
        reward_memory_gb: float | None = MEMORY_GB,
    ) -> None:
        super().__init__(
            path or HUB_ID,
            prompt,
            answer="solution",
            solution="solution",
            held_out_path=None if path else HELD_OUT_HUB_ID,
            reward=reward,
            reward_seconds=reward_seconds,
            reward_memory_gb=reward_memory_gb,
            max_new_tokens=1024,
        )
