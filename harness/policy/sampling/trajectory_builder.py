"""Trajectories while they are being written, token by token or turn by turn, with what the environment answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from klab.harness.policy.policy import Policy
from klab.harness.policy.prompt import closing_tokens

Environment = Callable[[int, int, str], str | None]
"""`environment(cell, trajectory, transcript)`: the environment's answer to what was written after the prompt so far
(both sides, without end tokens), called when the policy has ended its turn; None ends the episode."""


class TrajectoryBuilder:
    """N = P × group_size trajectories of one cell while they are being written; N of everything.

    Attributes:
        open: not ended yet.
        spent: own tokens.
        truncated: ended by the budget of own tokens.
        written: tokens, own ones and the environment's.
        own: which of them the policy wrote.
        logp: their log-probabilities, 0 where they are the environment's.
    """

    def __init__(
        self,
        policy: Policy,
        cell: int,
        prompts: list[list[int]],
        group_size: int,
        budget: int,
        environment: Environment | None,
    ) -> None:
        self.policy, self.cell, self.prompts, self.group_size = policy, cell, prompts, group_size
        self.budget, self.environment = budget, environment
        self.eos_token_ids, self.closing = policy.eos_token_ids, closing_tokens(policy.tokenizer)
        N = len(prompts) * group_size
        self.open = [True] * N
        self.spent = [0] * N
        self.truncated = [False] * N
        self.answers: list[list[int]] = [[] for _ in range(N)]  # environment tokens still to be written
        self.written: list[list[int]] = [[] for _ in range(N)]
        self.own: list[list[bool]] = [[] for _ in range(N)]
        self.logp: list[list[float]] = [[] for _ in range(N)]
        self.decoded: dict[tuple[int, ...], str] = {}  # many trajectories are equal

    @property
    def finished(self) -> bool:
        return not any(self.open)

    @property
    def newest(self) -> Tensor:
        """[N], the last token of each trajectory; any token for those that have ended."""
        return torch.tensor([row[-1] for row in self.written], device=self.policy.device)

    def write(self, drawn: Iterable[tuple[int, float]]) -> None:
        """One more token per open trajectory: the next of an environment's answer, or else the one that was drawn.

        Args:
            drawn: for every trajectory a token and its log-probability.
        """
        for row, (token, value) in enumerate(drawn):
            if not self.open[row]:
                continue
            if self.answers[row]:
                self.written[row].append(self.answers[row].pop(0))
                self.own[row].append(False)
                self.logp[row].append(0.0)
                continue
            self.written[row].append(token)
            self.own[row].append(True)
            self.logp[row].append(value)
            self.spent[row] += 1
            if token in self.eos_token_ids:
                self.open[row] = self._answered(row)
            elif self.spent[row] >= self.budget:
                self.open[row], self.truncated[row] = False, True

    def turn(self, row: int, tokens: Sequence[int], logp: Sequence[float]) -> None:
        """A whole turn of an open trajectory at once, and the environment's answer to it.

        Without an end token or tokens of the budget left, what stopped the turn (the model's context) truncates it.
        """
        self.written[row] += tokens
        self.own[row] += [True] * len(tokens)
        self.logp[row] += logp
        self.spent[row] += len(tokens)
        if tokens and tokens[-1] in self.eos_token_ids:
            self.open[row] = self._answered(row)
            self.written[row] += self.answers[row]
            self.own[row] += [False] * len(self.answers[row])
            self.logp[row] += [0.0] * len(self.answers[row])
            self.answers[row] = []
        else:
            self.open[row], self.truncated[row] = False, True

    def _answered(self, row: int) -> bool:
        if self.environment is None:
            return False
        answer = self.environment(self.cell, row, self.text(row, own_only=False))
        if answer is None:
            return False
        if self.spent[row] >= self.budget:
            self.truncated[row] = True
            return False
        self.answers[row] = list(self.policy.tokenizer(answer, add_special_tokens=False)["input_ids"])
        return True

    def text(self, row: int, own_only: bool) -> str:
        """What was written, without end tokens and without other special tokens at the end."""
        pairs = zip(self.written[row], self.own[row], strict=True)
        kept = tuple(token for token, own in pairs if token not in self.eos_token_ids and (own or not own_only))
        if kept not in self.decoded:
            shown = list(kept)
            while shown and shown[-1] in self.closing:
                shown.pop()
            self.decoded[kept] = str(self.policy.tokenizer.decode(shown, skip_special_tokens=False))
        return self.decoded[kept]
