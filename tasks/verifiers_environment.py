"""Environments written for Prime Intellect's `verifiers`: a dataset, a system prompt and a rubric, as a task.

The environment's own code runs in the process of a `Worker` (`klab.tasks.verifiers_process`), and no server takes part.
Where there are several turns, an episode is replayed from its transcript wherever it goes on or is scored.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from hashlib import sha256
from importlib import metadata
from typing import Any

from klab.grid import user_code
from klab.grid.errors import UserError
from klab.grid.schema.task import VerifiersTask
from klab.tasks.answered import found_in
from klab.tasks.file import Template, held_out_rows
from klab.tasks.packages import require_package
from klab.tasks.task import Example, Score, SplitName
from klab.tasks.worker import CallFailed, CallOverdue, Worker

_CHUNK = 500
"""Rows that are asked for at a time."""

_LOADING_SECONDS = 900.0
"""Limit of the time for making the environment, which may read a large dataset, and for a chunk of rows."""

_TRIED = 8
"""Reference completions that must earn what is right before a tiny policy is warmed up on all of them."""


class VerifiersEnvironment:
    """The prompts of an environment's dataset, scored by its rubric.

    Held out is the environment's dataset for evaluation, else one prompt in ten, chosen by a hash of its text. A prompt
    that is held out is never trained on.

    Args:
        parameters: those of `klab.grid.schema.task.VerifiersTask`.

    Raises:
        UserError: verifiers is not installed, or in a version without these environments; for the environment, when
            something of it is first asked for.
    """

    name = "verifiers"
    has_reward_timeouts = True
    scores_transcripts = True
    lists_prompts = True

    def __init__(self, **parameters: Any) -> None:
        require_package("verifiers", "verifiers", "task.name", self.name)
        _check_version(metadata.version("verifiers"))
        self.section = VerifiersTask.model_validate({**parameters, "name": self.name})
        self.max_new_tokens = self.section.max_new_tokens
        writing = self.section.model_dump(include={"response", "opens", "closes"})
        self._arguments = {"arguments": self.section.arguments.values, "writing": writing}

    def split(self, name: SplitName) -> Sequence[Example]:
        return self._splits[name]

    def score(self, example: Example, completion: str) -> Score:
        return next(self.score_all([example], [completion]))

    def score_all(self, examples: Sequence[Example], completions: Sequence[str]) -> Iterator[Score]:
        """The scores of many completions, in order: asked for together, and one by one where that ends badly.

        Raises:
            UserError: the environment itself fails; a reward function that raises is worth 0, as in the library, and
                counted as `reward_errors`.
        """
        rows = [[*example.columns["row"], text] for example, text in zip(examples, completions, strict=True)]
        try:
            found = self._asked({"scores": rows}, self.section.reward_seconds * len(rows))
        except (CallOverdue, CallFailed):
            found = None
        for number, row in enumerate(rows):
            yield self._scored(found[number]) if found is not None else self._alone(row)

    def respond(self, example: Example, transcript: str) -> str | None:
        """The environment's answer to the last turn; an environment that takes too long over it ends the episode."""
        if not self.interactive:
            return None
        self._asked({}, _LOADING_SECONDS)
        request = {"reply": [*example.columns["row"], transcript]}
        try:
            found: str | None = self._asked(request, self.section.reward_seconds)
        except (CallOverdue, CallFailed):
            return None
        return found

    @property
    def interactive(self) -> bool:
        """Whether the environment answers the policy."""
        return bool(self._description["interactive"])

    @cached_property
    def reward_weights(self) -> dict[str, float]:
        """Weights of the reward functions by name; none where two share a name, so that only their sum is known."""
        return dict(self._description["weights"]) if self._description["names_differ"] else {}

    @cached_property
    def alphabet(self) -> str | None:
        """The characters of all prompts and solutions; None where there is nothing to warm up on (`no_alphabet`)."""
        if self.no_alphabet:
            return None
        return "".join(sorted(set().union(*(each.prompt + each.solution for each in self._all))))

    @cached_property
    def no_alphabet(self) -> str | None:
        """Why there is no alphabet for a tiny policy; None where there is one."""
        if self.interactive:
            return "it would have to know every character that the environment may answer"
        if self.section.solution is None:
            return "task.solution names no reference completions"
        tried = self._splits["train"][:_TRIED]
        if not all(score.correct for score in self.score_all(tried, [each.solution for each in tried])):
            return f"{tried[0].solution!r} and the like, of task.solution, are not right by the environment's own score"
        return None

    @property
    def _all(self) -> list[Example]:
        return [*self._splits["train"], *self._splits["held_out"]]

    @cached_property
    def _description(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._asked({}, _LOADING_SECONDS)
        correct = self.section.correct
        if correct is not None and correct not in found["weights"]:
            raise UserError(
                "unknown reward function", key="task.correct", value=correct, allowed=list(found["weights"])
            )
        fields = type(self.section).model_fields
        for key, matters in (
            ("response", found["interactive"]),
            *((key, found["has_tools"]) for key in ("opens", "closes", "describe")),
        ):
            value = getattr(self.section, key)
            if value != fields[key].default and not matters:
                lacks = "answers" if key == "response" else "tools"
                problem = f"has no effect: the environment has no {lacks}"
                raise UserError(problem, key=f"task.{key}", value=value)
        return found

    @cached_property
    def _splits(self) -> dict[SplitName, list[Example]]:
        train = self._read("train")
        if self._description["sizes"]["held_out"]:
            held_out = self._read("held_out")
            known = {each.prompt for each in held_out}
            kept = [each for each in train if each.prompt not in known]
            if not kept:
                problem = "all of its prompts are in its dataset for evaluation as well"
                raise UserError(problem, key="task.environment", value=self.section.environment)
            return {"train": kept, "held_out": held_out}
        digests = [sha256(each.prompt.encode("utf-8", "surrogatepass")).digest() for each in train]
        apart = held_out_rows(digests, self.section.environment, "task.environment")
        return {
            "train": [each for i, each in enumerate(train) if i not in apart],
            "held_out": [each for i, each in enumerate(train) if i in apart],
        }

    def _read(self, split: SplitName) -> list[Example]:
        section, size = self.section, self._description["sizes"][split]
        prompt, message = Template(section.prompt), Template(section.message)
        solution = None if section.solution is None else Template(section.solution)
        examples = []
        for first in range(0, size, _CHUNK):
            rows = self._asked({"rows": [split, first, min(_CHUNK, size - first)]}, _LOADING_SECONDS)
            for index, row in enumerate(rows, first):
                spoken = (
                    _rendered(message, {"role": role, "content": text}, "message") for role, text in row["messages"]
                )
                columns = {**row["columns"], "messages": section.separator.join(spoken), "answer": row["answer"]}
                asked = self._described(row["tools"]) + _rendered(prompt, columns, "prompt")
                solved = "" if solution is None else _rendered(solution, columns, "solution")
                examples.append(Example(asked, row["answer"], solved, {**row["columns"], "row": (split, index)}))
        return examples

    def _described(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """What prompts say of the tools."""
        if not tools or not self.section.describe:
            return ""
        call = f'{self.section.opens}{{"name": "tool", "arguments": {{}}}}{self.section.closes}'
        lines = [f"You may call these tools, each call written as {call}:", *map(json.dumps, tools)]
        return "\n".join(lines) + "\n\n"

    def _alone(self, row: list[Any]) -> Score:
        """The score of one completion; what takes too long or too much memory is worth 0 and counted. That the
        environment is made again, in a process that is new, takes none of its time."""
        self._asked({}, _LOADING_SECONDS)
        try:
            return self._scored(self._asked({"scores": [row]}, self.section.reward_seconds)[0])
        except (CallOverdue, CallFailed):
            return Score(0.0, False, {name: 0.0 for name in self._description["weights"]}, timeouts=1)

    def _scored(self, found: Mapping[str, Any]) -> Score:
        reward, parts = found["reward"], found["parts"]
        if not math.isfinite(reward):
            raise UserError("a reward must be finite", key="task.environment", value=reward)
        correct = self.section.correct
        return Score(reward, (reward if correct is None else parts[correct]) >= 1.0, parts)

    def _asked(self, request: Mapping[str, Any], seconds: float) -> Any:
        location = user_code.locate(self.section.environment, "task.environment")
        source = location.source
        changed = source.stat().st_mtime_ns if source is not None else 0
        worker = _worker(os.getpid(), location, changed, self.section.environment, self.section.reward_memory_gb)
        try:
            worker.start()
        except UserError as error:
            raise UserError(
                error.problem,
                key="task.environment",
                value=self.section.environment,
                allowed=[*error.allowed, *installed_environments()],
                hint=error.hint,
            ) from None
        return found_in(worker({**self._arguments, **request}, seconds=seconds))


@lru_cache(maxsize=4)
def _worker(
    process: int, location: user_code.Location, changed: int, environment: str, memory_gb: float | None
) -> Worker:
    """The process of one environment's code, as it is now, that all tasks of this one share."""
    return Worker(
        environment,
        _LOADING_SECONDS,
        memory_gb,
        caller="klab.tasks.verifiers_process:Calling",
        plain=True,
        environment={"PYTHONHASHSEED": "0", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
    )


def installed_environments() -> list[str]:
    """The installed distributions that need verifiers, by the names under which it loads them."""
    found = []
    for each in metadata.distributions():
        if any(line.replace(" ", "").startswith("verifiers") for line in each.requires or ()):
            found.append(each.metadata["Name"])
    return sorted({name for name in found if name != "klab"})


def _check_version(version: str) -> None:
    """Raises a UserError for a version that has no `SingleTurnEnv`, or whose rollouts take no client of one's own."""
    if not version.startswith("0.2."):
        raise UserError(
            f"needs verifiers 0.2, and {version} is installed",
            key="task.name",
            value="verifiers",
            hint="Later versions have no SingleTurnEnv and no Rubric, earlier ones take no client of one's own. "
            "Install it with: pip install 'klab[verifiers]'",
        )


def _rendered(template: Template, row: Mapping[str, Any], key: str) -> str:
    for column in template.columns:
        if column not in row:
            raise UserError("unknown column", key=f"task.{key}", value=column, allowed=list(row))
    return template.render(row)
