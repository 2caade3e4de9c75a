"""What the rest of the harness may ask of a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from klab.harness.policy.rollout import Rollout
    from klab.harness.policy.scores import TokenScores


class IncrementalDecoder(Protocol):
    """The trajectories of every cell of a policy while they grow by one token per step."""

    def start(self) -> dict[int, Tensor]:
        """Logits [N, V] of the first token of each trajectory, by cell."""
        ...

    def step(self, newest: Mapping[int, Tensor], open_rows: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        """Logits [N, V] of the next token of every open trajectory of some cells; rows of ended ones are meaningless.

        Args:
            newest: by cell, the last token [N] of each trajectory.
            open_rows: by cell, which trajectories go on.
        """
        ...


class Policy(Protocol):
    """C language models of one architecture with their tokenizer.

    Attributes:
        cells: C.
        parameters: name -> [C, …], the leaf tensors that are trained. What else the model consists of is frozen.
        width: size of the final hidden states.
        context: the longest sequence it was made for, prompt included, in tokens.
    """

    cells: int
    tokenizer: PreTrainedTokenizerFast
    parameters: dict[str, Tensor]

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a turn."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def decoder(
        self, prompts: Sequence[Sequence[Sequence[int]]], group_size: int, plain: bool = False
    ) -> IncrementalDecoder:
        """Begin to continue `group_size` trajectories of every prompt [C][P][length]; `plain`: the reference path."""
        ...

    def score(
        self,
        rollouts: Sequence[Rollout],
        *,
        temperature: float = 1.0,
        logits: bool = False,
        entropy: bool = False,
        states: bool = False,
        plain: bool = False,
    ) -> list[TokenScores]:
        """See `klab.harness.policy.scores.token_scores`."""
        ...

    def frozen_copy(self, dtype: torch.dtype | None = None) -> Policy:
        """The policy as it is, without gradient and unmoved by what happens to this one: the reference.

        Args:
            dtype: of the copy, all of its weights included; None: as they are.
        """
        ...

    def select(self, cells: Sequence[int]) -> Policy:
        """Some of the cells as a policy of their own, to sample from: without gradient."""
        ...

    def save(self, path: str | Path, cell: int) -> None:
        """One cell as a folder that transformers (or PEFT) loads."""
        ...

    def load(self, path: str | Path, cell: int) -> None:
        """Put the weights of such a folder into one cell. Raises UserError where it has another architecture."""
        ...
