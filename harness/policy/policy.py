"""The interface of a policy: what the rest of the harness may ask of C language models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from klab.harness.policy.prompt import PromptEncoder
from klab.harness.policy.scores import Scorer


class IncrementalDecoder(Protocol):
    """Next-token logits of every cell's trajectories, which grow by one token per step.

    Logits are [N, vocab_size] for the N trajectories of a cell, without gradient where gradients are disabled.
    """

    def start(self) -> dict[int, Tensor]:
        """Logits of the first token of each trajectory, by cell."""
        ...

    def step(self, last_tokens: Mapping[int, Tensor], unfinished: Mapping[int, Sequence[bool]]) -> dict[int, Tensor]:
        """Logits of the next token of some cells' trajectories; rows of finished ones are meaningless.

        Args:
            last_tokens: by cell, the last token [N] of each trajectory.
            unfinished: by cell, which of its trajectories go on.

        Raises:
            UserError: a sequence exceeds the model's context.
        """
        ...


class Policy(Scorer, Protocol):
    """C language models of one architecture with one tokenizer.

    Attributes:
        cells: C.
        encode_prompt: token ids of a prompt for these models.
        origin, revision: folder or hub id of the checkpoint that they started from, and its revision on the hub.
        parameters: name -> [C, …], the leaf tensors that are trained; all other weights are frozen.
    """

    tokenizer: PreTrainedTokenizerFast
    encode_prompt: PromptEncoder
    origin: str
    revision: str | None
    parameters: dict[str, Tensor]

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def context_length(self) -> int:
        """The longest sequence the model was made for, prompt included, in tokens."""
        ...

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
        """A decoder that continues every prompt `group_size` times.

        Args:
            prompts: token ids [C][P][length].
            plain: the reference path: no cache, nothing shared.
        """
        ...

    def frozen_copy(self, dtype: torch.dtype | None = None) -> Policy:
        """A copy without gradient that does not change when this policy does: a reference policy, or a sampler.

        Args:
            dtype: of all its weights; None: as they are.
        """
        ...

    def select(self, cells: Sequence[int]) -> Policy:
        """Some of the cells as a policy of their own to sample from, without gradient."""
        ...

    def save(self, path: str | Path, cell: int) -> None:
        """Write one cell as a folder that transformers (or PEFT, if it has adapters) loads."""
        ...

    def named_weights(self, cell: int) -> Iterator[tuple[str, Tensor]]:
        """One cell's weights under their names in transformers, adapters merged, tied ones once; made one by one."""
        ...

    def load(self, path: str | Path, cell: int) -> None:
        """Put the weights of such a folder into one cell.

        Raises:
            UserError: they belong to another architecture or to other adapters.
        """
        ...

    def release_memory(self) -> None:
        """Drop what is kept for speed only and can be made again."""
        ...
