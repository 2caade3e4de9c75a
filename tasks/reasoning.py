"""Generated problems of reasoning-gym as a task: its datasets, composites and curricula, each with its own scorer.

Problem `i` of a stream is made from the seed `stream + i`, as in reasoning-gym, where two datasets with neighbouring
seeds share nearly all of their problems. Streams are therefore 2^20 apart: `2·seed` of them to train on and the one
after it to evaluate on. What is asked in held-out problems is never asked in training.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from klab.grid.errors import UserError
from klab.grid.schema.task import ReasoningTask
from klab.tasks.answered import found_in
from klab.tasks.file import Template
from klab.tasks.packages import require_package
from klab.tasks.task import Example, Score, SplitName
from klab.tasks.worker import CallFailed, CallOverdue, Worker

LARGEST_ALPHABET = 96
"""Most different characters, in prompts and answers, for which there is a tiny policy."""

LONGEST_TEXT = 512
"""Most characters of a prompt and its answer for which there is a tiny policy."""

TAGGED_TOKENS = 512

_STREAM = 2**20
_CHUNK = 250
"""Problems that are asked for at a time."""

_GENERATION_SECONDS = 300.0
"""Limit of the time for a chunk of problems."""

_TAGGED = re.compile(r"<answer>\s?(.*?)\s?</answer>", re.DOTALL)


class Reasoning:
    """Problems of one dataset of reasoning-gym, or of several.

    Args:
        parameters: those of `klab.grid.schema.task.ReasoningTask`.

    Raises:
        UserError: reasoning-gym is not installed, or a setting is wrong; for the datasets, when a split is first used.
    """

    name = "reasoning_gym"
    interactive = False
    has_reward_timeouts = True
    lists_prompts = True

    def __init__(self, **parameters: Any) -> None:
        require_package("reasoning-gym", "reasoning", "task.name", self.name)
        self.section = ReasoningTask.model_validate({**parameters, "name": self.name})
        parts = [part.model_dump(mode="json") for part in self.section.parts]
        self._request = {"parts": parts, "size": max(self.section.size, self.section.held_out)}

    def split(self, name: SplitName) -> Sequence[Example]:
        return self._splits[name]

    def score(self, example: Example, completion: str) -> Score:
        return next(self.score_all([example], [completion]))

    def score_all(self, examples: Sequence[Example], completions: Sequence[str]) -> Iterator[Score]:
        """The scores of many completions, in order: asked for together, and one by one where that ends badly."""
        texts = [self.answer_of(completion) for completion in completions]
        rows = [
            [*example.columns["problem"], text]
            for example, text in zip(examples, texts, strict=True)
            if text is not None
        ]
        try:
            found: list[float] | None = self._asked({"scores": rows}, self.section.reward_seconds) if rows else []
        except (CallOverdue, CallFailed):
            found = None
        values = iter(found or ())
        for example, text in zip(examples, texts, strict=True):
            if text is None:
                yield Score(0.0, False)
            elif found is not None:
                yield _scored(next(values))
            else:
                yield self._alone([*example.columns["problem"], text])

    def respond(self, example: Example, transcript: str) -> str | None:
        return None

    def answer_of(self, completion: str) -> str | None:
        """The answer in a completion; None where the tags are missing."""
        if self.section.answer == "plain":
            return completion.strip()
        found = _TAGGED.findall(completion)
        return found[-1].strip() if found else None

    @cached_property
    def alphabet(self) -> str | None:
        """The characters of all prompts and answers; None where a tiny policy could not learn them (`no_alphabet`)."""
        return None if self.no_alphabet else "".join(sorted(self._characters))

    @cached_property
    def no_alphabet(self) -> str | None:
        """Why there is no alphabet for a tiny policy; None where there is one."""
        longest = max(len(each.prompt) + len(each.solution) for each in self._all)
        problems = []
        if len(self._characters) > LARGEST_ALPHABET:
            problems.append(f"{len(self._characters)} different characters, of at most {LARGEST_ALPHABET}")
        if longest > LONGEST_TEXT:
            problems.append(f"prompts with {longest} characters, answers included, of at most {LONGEST_TEXT}")
        if not all(each.solution for each in self._splits["train"]):
            problems.append("problems without an answer that earns 1, on which it could be warmed up")
        if not problems:
            return None
        return f"{', '.join(self._request_names)} has {' and '.join(problems)}"

    @cached_property
    def max_new_tokens(self) -> int:
        if self.section.max_new_tokens is not None:
            return self.section.max_new_tokens
        if self.section.answer == "tags":
            return TAGGED_TOKENS
        return 1 + max(len(each.answer) for each in self._all)

    @property
    def _request_names(self) -> list[str]:
        return [part.dataset for part in self.section.parts]

    @property
    def _all(self) -> list[Example]:
        return [*self._splits["train"], *self._splits["held_out"]]

    @cached_property
    def _characters(self) -> set[str]:
        return set().union(*(each.prompt + each.solution for each in self._all))

    @property
    def _splits(self) -> dict[SplitName, list[Example]]:
        key = self.section.model_dump_json(exclude={"max_new_tokens", "reward_seconds", "reward_memory_gb", "label"})
        if key not in _known:
            while len(_known) >= _KEPT:
                del _known[next(iter(_known))]
            _known[key] = self._made()
        return _known[key]

    def _made(self) -> dict[SplitName, list[Example]]:
        stream = 2 * self.section.seed * _STREAM
        held_out: dict[str, Example] = {}
        for each in self._generated(stream + _STREAM, self.section.held_out):
            held_out.setdefault(each.prompt, each)
        train = [each for each in self._generated(stream, self.section.size) if each.prompt not in held_out]
        if not train:
            raise UserError(
                f"the {len(held_out)} prompts that are held out are all that were generated",
                key="task.held_out",
                value=self.section.held_out,
                hint="Hold out fewer, or choose parameters with more different problems.",
            )
        return {"train": train, "held_out": list(held_out.values())}

    def _generated(self, seed: int, count: int) -> list[Example]:
        template, prefix = Template(self.section.prompt), self._prefix
        found = []
        for first in range(0, count, _CHUNK):
            request = {"entries": [seed, first, min(_CHUNK, count - first)]}
            for index, (question, answer, metadata, solved) in enumerate(
                self._asked(request, _GENERATION_SECONDS), first
            ):
                row = {**metadata, "question": question}
                for column in template.columns:
                    if column not in row:
                        raise UserError("unknown field of a problem", key="task.prompt", value=column, allowed=row)
                solution = (
                    (answer if self.section.answer == "plain" else f"<answer>{answer}</answer>") if solved else ""
                )
                columns = {**row, "problem": (seed, index)}
                found.append(Example(prefix + template.render(row), answer, solution, columns))
        return found

    @property
    def _prefix(self) -> str:
        written = self.section.instruction
        if written is None:
            written = "default" if self.section.answer == "tags" else ""
        prompts: Mapping[str, str] = self._asked({}, _GENERATION_SECONDS)
        if written in prompts:
            written = prompts[written]
        elif written and not re.search(r"\s", written):
            hint = "A text of your own has more than one word."
            raise UserError("unknown system prompt", key="task.instruction", value=written, allowed=prompts, hint=hint)
        return f"{written.rstrip()}\n\n" if written else ""

    def _alone(self, row: list[Any]) -> Score:
        """The score of one completion; what takes too long or too much memory is worth 0 and counted. That the problem
        is made again, in a process that is new, takes none of its time."""
        self._asked({"entries": [*row[:2], 1]}, _GENERATION_SECONDS)
        try:
            return _scored(self._asked({"scores": [row]}, self.section.reward_seconds)[0])
        except (CallOverdue, CallFailed):
            return Score(0.0, False, timeouts=1)

    def _asked(self, request: Mapping[str, Any], seconds: float) -> Any:
        worker = _worker(os.getpid(), self.section.reward_memory_gb)
        return found_in(worker({**self._request, **request}, seconds=seconds))


_KEPT = 8
_known: dict[str, dict[SplitName, list[Example]]] = {}
"""The problems of the sections that were used last: the cells of a pack share them."""


@lru_cache(maxsize=4)
def _worker(process: int, memory_gb: float | None) -> Worker:
    """The process of generators and scorers that all tasks of this one share."""
    return Worker(
        "klab.tasks.reasoning_generators:answer",
        _GENERATION_SECONDS,
        memory_gb,
        plain=True,
        environment={"PYTHONHASHSEED": "0"},
    )


def _scored(value: float) -> Score:
    return Score(value, value >= 1.0)


def small_datasets() -> dict[str, str | None]:
    """For every dataset of reasoning-gym why, with its default parameters, it has no alphabet for a tiny policy, by 16
    of its problems; None for one that has."""
    from klab.tasks.reasoning_generators import dataset_names

    return {name: Reasoning(dataset=name, size=16, held_out=2).no_alphabet for name in dataset_names()}


if __name__ == "__main__":
    for each, why in small_datasets().items():
        print(each, "tiny" if why is None else f"hf: {why}", sep="\t")
