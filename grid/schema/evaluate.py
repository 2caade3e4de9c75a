"""The `evaluate` section of a grid file: what a finished policy is evaluated on besides its task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from klab.grid.errors import UserError
from klab.grid.schema.base import Count, Minutes, Section


class Evaluations(Section):
    """Tasks of lm-evaluation-harness (Gao et al. 2024) on which every finished cell's policy is evaluated (extra
    `lm_eval`).

    They run in a process of their own when training is over, before the cell's result is written, and are kept task by
    task in the cell's `lm_eval.json`: a cell that is stopped in between goes on with the tasks that are left. An
    evaluation that fails is recorded there with its reason, and the cell is finished all the same; diverged cells are
    not evaluated. No part of a cell's id.
    """

    lm_eval: tuple[str, ...]
    """Names of tasks, groups or tags of lm-evaluation-harness, or YAML files of tasks of your own, relative to the grid
    file."""
    limit: Count | None = None
    """Documents per task; null: all."""
    fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; null: the task's."""
    batch_size: Count = 16
    """Requests that the model reads at once."""
    chat_template: bool = False
    """Whether questions are put as messages, by the tokenizer's chat template."""
    device: Literal["auto", "cpu"] = "auto"
    """Where the policy is evaluated: `auto` takes a GPU where the cell has one, beside the policy in training."""
    minutes: Minutes | None = None
    """Time limit of one task; null: none. Processes that train a cell together wait for it no longer than
    `resources.collective_minutes`."""

    @field_validator("lm_eval", mode="before")
    @classmethod
    def _listed(cls, given: object) -> object:
        """One name stands for a list of one."""
        names = [given] if isinstance(given, str) else given
        if (
            not isinstance(names, list | tuple)
            or not names
            or not all(isinstance(name, str) and name for name in names)
        ):
            raise UserError("not a task of lm-evaluation-harness, nor a list of them", key="lm_eval", value=given)
        if len(set(names)) < len(names):
            raise UserError("a task stands twice", key="lm_eval", value=given)
        return names
