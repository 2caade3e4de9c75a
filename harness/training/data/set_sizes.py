"""Training and evaluation sets that are smaller than what a cell asks of them."""

from __future__ import annotations

from collections.abc import Iterator

from klab.grid.schema.sections import TrainingSection


def small_set_notes(training: TrainingSection, train: int, held_out: int) -> Iterator[str]:
    """One line for each set with fewer prompts than asked for: allowed, but not what was written.

    Args:
        train, held_out: prompts in each split.
    """
    if training.evaluation_prompts > held_out:
        yield (
            f"training.evaluation_prompts: {training.evaluation_prompts}, but {held_out} prompts are held out: "
            "evaluations use these"
        )
    if training.prompts > train:
        yield f"training.prompts: {training.prompts}, but there are {train} to train on: each rollout repeats some"
