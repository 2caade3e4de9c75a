"""A dataset of the user's own as a task: which column is the prompt, which the answer, and what is rewarded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any, overload

from klab.grid.errors import UserError
from klab.tasks.dataset import Table, chosen_split, load_tables, require_columns
from klab.tasks.rewards import Rewards
from klab.tasks.splits import split_of
from klab.tasks.task import Example, Score, SplitName
from klab.tasks.values import is_text, text_of
from klab.tasks.worker import MEMORY_GB

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


class Template:
    """A prompt from a row: the column of that name, or a text with `{column}`; `{{` and `}}` are braces, `{}` stays."""

    def __init__(self, text: str) -> None:
        found = [match.group(1) for match in _PLACE.finditer(text) if match.group(1)]
        self.text = text if found else f"{{{text}}}"
        self.columns = list(dict.fromkeys(found or [text]))

    def render(self, row: Mapping[str, Any]) -> str:
        return _PLACE.sub(
            lambda match: text_of(row[match.group(1)]) or "" if match.group(1) else match.group()[0], self.text
        )


class File:
    """Prompts and answers from a dataset that `datasets` can read.

    Held out is, in this order: `held_out_path`, the split `held_out`, the dataset's own test or validation split, else
    one prompt in ten, chosen by a hash of its text. A prompt that is held out is never trained on, wherever it occurs.

    Args:
        path: see `klab.tasks.dataset.load_tables`.
        prompt: see `Template`.
        answer: column of the ground truth; lists and mappings become JSON. None: every answer is "".
        solution: column of reference completions, for warming up a tiny policy.
        config: the hub dataset's configuration.
        train, held_out: names of splits.
        held_out_path: another dataset of the same columns.
        reward, reward_seconds, reward_memory_gb: see `klab.tasks.rewards.Rewards`.
        alphabet: the characters of all prompts and solutions, for a tiny policy.
        max_new_tokens: default budget of own tokens.

    Raises:
        UserError: for a reward that does not exist; for everything about the data when a split is first used.
    """

    name = "file"
    interactive = False

    def __init__(
        self,
        path: str,
        prompt: str,
        answer: str | None = None,
        solution: str | None = None,
        config: str | None = None,
        train: str | None = None,
        held_out: str | None = None,
        held_out_path: str | None = None,
        reward: object = "exact",
        reward_seconds: float = 10.0,
        reward_memory_gb: float | None = MEMORY_GB,
        alphabet: str | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        self.path, self.config = path, config
        self.alphabet, self.max_new_tokens = alphabet, max_new_tokens
        self._template, self._answer, self._solution = Template(prompt), answer, solution
        self._train, self._held_out, self._held_out_path = train, held_out, held_out_path
        self._rewards = Rewards(reward, reward_seconds, reward_memory_gb)
        self.has_reward_timeouts = self._rewards.has_timeouts
        self.reward_weights = dict(zip(self._rewards.names, self._rewards.weights, strict=True))

    def split(self, name: SplitName) -> Sequence[Example]:
        return self._splits[name]

    def score(self, example: Example, completion: str) -> Score:
        return self._rewards.score(example, completion)

    def score_all(self, examples: Sequence[Example], completions: Sequence[str]) -> Iterator[Score]:
        """The scores of many completions, in order; a reward model reads several at a time.

        A subclass that overrides `score` alone is asked one by one.
        """
        if type(self).score is not File.score:
            return map(self.score, examples, completions)
        return self._rewards.score_all(examples, completions)

    def respond(self, example: Example, transcript: str) -> str | None:
        return None

    def solution_of(self, text: str) -> str:
        """The reference completion that a solution column's text stands for."""
        return text

    @cached_property
    def _splits(self) -> dict[SplitName, Examples]:
        tables = load_tables(self.path, self.config)
        train = chosen_split(tables, self._train, "train", self.path)
        others, path = tables, self.path
        if self._held_out_path is not None:
            others, path = load_tables(self._held_out_path, key="task.held_out_path"), self._held_out_path
        apart = chosen_split(others, self._held_out, "held_out", path)
        if apart is None and others is not tables:
            apart = chosen_split(others, None, "train", path)
        learnt, asked = self._read(tables, train, self.path)
        if apart is None or (others is tables and apart == train):
            rows = held_out_rows(asked, self.path, "task.path")
            kept = [i for i in range(len(asked)) if i not in rows]
            return {"train": learnt.rows(kept), "held_out": learnt.rows(sorted(rows))}
        examined, held = self._read(others, apart, path)
        known = set(held)
        kept = [i for i, digest in enumerate(asked) if digest not in known]
        if not kept:
            raise UserError("all of its prompts are held out as well", file=self.path, key="task.train", value=train)
        return {"train": learnt.rows(kept), "held_out": examined}

    def _read(self, tables: Mapping[str, Table], split: str | None, path: str) -> tuple[Examples, list[bytes]]:
        """All examples of a split, and a digest of each one's prompt."""
        table = tables[str(split)]
        if not len(table):
            raise UserError("the split is empty", file=path, key="task.path", value=split)
        columns = [("prompt", column) for column in self._template.columns]
        columns += [("answer", self._answer), ("solution", self._solution)]
        require_columns(table, [(setting, column) for setting, column in columns if column is not None], path)
        digests = []
        for i, row in enumerate(table.select_columns(self._template.columns)):
            prompt = self._prompt(row, i, path)
            digests.append(sha256(prompt.encode("utf-8", "surrogatepass")).digest())
        return Examples(table, lambda row, i: self._example(row, i, path), range(len(table))), digests

    def _prompt(self, row: Mapping[str, Any], number: int, path: str) -> str:
        for column in self._template.columns:
            if not is_text(row[column]):
                raise UserError(
                    f"row {number}, column {column!r}: a prompt is made of text",
                    file=path,
                    key="task.prompt",
                    value=row[column],
                )
        prompt = self._template.render(row)
        if not prompt:
            raise UserError(f"row {number}: the prompt is empty", file=path, key="task.prompt", value=prompt)
        self._check_alphabet("prompt", prompt, number, path)
        return prompt

    def _example(self, row: Mapping[str, Any], number: int, path: str) -> Example:
        answer, solution = "", ""
        if self._answer is not None:
            answer = self._text(row, "answer", self._answer, number, path)
        if self._solution is not None:
            solution = self._text(row, "solution", self._solution, number, path)
        solution = self.solution_of(solution)
        self._check_alphabet("solution", solution, number, path)
        return Example(self._prompt(row, number, path), answer, solution, row)

    def _text(self, row: Mapping[str, Any], setting: str, column: str, number: int, path: str) -> str:
        text = text_of(row[column])
        if text is None:
            raise UserError(f"row {number} has none", file=path, key=f"task.{setting}", value=column)
        return text

    def _check_alphabet(self, setting: str, text: str, number: int, path: str) -> None:
        if self.alphabet is not None and not set(text) <= set(self.alphabet):
            outside = "".join(sorted(set(text) - set(self.alphabet)))
            raise UserError(
                f"row {number}: its {setting} has characters that are not in it: {outside!r}",
                file=path,
                key="task.alphabet",
                value=self.alphabet,
            )


class Examples(Sequence[Example]):
    """Some rows of a table, each made into an example when it is asked for."""

    def __init__(self, table: Table, make: Callable[[Mapping[str, Any], int], Example], rows: Sequence[int]) -> None:
        self._table, self._make, self._rows = table, make, rows

    def rows(self, rows: Sequence[int]) -> Examples:
        """The examples of these rows of the table."""
        return Examples(self._table, self._make, rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._at(row) for row in self._rows[index]]
        return self._at(self._rows[index])

    def _at(self, row: int) -> Example:
        return self._make(self._table[row], row)


def held_out_rows(digests: Sequence[bytes], path: str, key: str) -> set[int]:
    """Rows whose prompts are held out by their hash: about one prompt in ten, at least one, never all.

    Args:
        digests: of each row's prompt.
        path, key: where they come from, and the setting that says so, for the message.
    """
    prompts = sorted(set(digests))
    if len(prompts) < 2:
        raise UserError("needs at least two different prompts, one to hold out", file=path, key=key)
    apart = {prompt for prompt in prompts if split_of(prompt.hex()) == "held_out"} or {prompts[0]}
    if len(apart) == len(prompts):
        apart.remove(prompts[0])
    return {i for i, digest in enumerate(digests) if digest in apart}
