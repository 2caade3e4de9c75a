"""The interface of a policy: what the rest of the harness may ask of C language models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klab.harness.policy.categorical import Draw
from klab.harness.policy.prompt import PromptEncoder
from klab.harness.policy.scores import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class IncrementalDecoder(Protocol):
    """Next-token logits of every cell's trajectories, which grow by one token per step.

    Logits are [N, vocab_size] for the N trajectories of a cell, without gradient where gradients are disabled.

    Attributes:
        one_by_one: whether cells are better continued one after the other, each to its end.
    """

    one_by_one: bool

    def start(self, cells: Sequence[int]) -> dict[int, Tensor]:
        """Logits of the first token of each trajectory of some cells; all at once unless `one_by_one`."""
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

    def known_states(self, cell: int) -> object:
        """What a policy's scoring understands of a cell's trajectories, so that it need not compute them again; None
        where nothing was kept."""
        ...


@dataclass(frozen=True, slots=True)
class Continuation:
    """Where a cell's N trajectories stand, and how they go on.

    Attributes:
        last_tokens: the last token of each; its prompt's where it has none.
        num_tokens: tokens of each after its prompt.
        unfinished: which go on.
        forced: the tokens that each has to take next.
        most: the most tokens that one of them may still take.
        uniforms: float64 [steps, N], the random numbers of each one's next steps; None where nothing is drawn.
    """

    last_tokens: Sequence[int]
    num_tokens: Sequence[int]
    unfinished: Sequence[bool]
    forced: Sequence[Sequence[int]]
    most: int
    uniforms: NDArray[np.float64] | None


@dataclass(frozen=True, slots=True)
class DrawnBlock:
    """The next tokens [steps, N] of a cell's trajectories, forced ones among them, and their log-probabilities.

    A trajectory that ended its turn, or was finished before, has nothing of meaning after that.
    """

    tokens: NDArray[np.int64]
    logp: NDArray[np.float64]


class BlockDecoder(Protocol):
    """Draws next tokens on a device, several steps between two copies to the host."""

    max_steps: int
    """Of a block."""

    def draw(self, continuations: Mapping[int, Continuation]) -> dict[int, DrawnBlock]:
        """The next block of some cells' trajectories.

        Raises:
            UserError: a sequence exceeds the model's context.
        """
        ...

    def close(self) -> None:
        """Nothing more is drawn: give back memory that others need."""
        ...


class Policy(Scorer, Protocol):
    """C language models of one architecture with one tokenizer.

    Attributes:
        cells: C.
        encode_prompt: token ids of a prompt for these models.
        origin, revision: folder or hub id of the checkpoint that they started from, and its revision on the hub.
        parameters: name -> [C, …], the leaf tensors that are trained; all other weights are frozen.
        config: the transformers configuration.
    """

    config: Any

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
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        group_size: int,
        plain: bool = False,
        kept_tokens: int = 0,
    ) -> IncrementalDecoder:
        """A decoder that continues every prompt `group_size` times.

        Args:
            prompts: token ids [C][P][length].
            plain: the reference path: no cache, nothing shared.
            kept_tokens: of each trajectory, that an update from the same weights may need; see `known_states`.
        """
        ...

    def block_decoder(
        self, prompts: Sequence[Sequence[Sequence[int]]], group_size: int, max_new_tokens: int, draw: Draw
    ) -> BlockDecoder | None:
        """A decoder that draws the tokens itself; None where the policy has none.

        Args:
            max_new_tokens: that a trajectory is expected to take at most; more need other memory.
        """
        ...

    def frozen_copy(self, dtype: torch.dtype | None = None) -> Policy:
        """A copy without gradient that does not change when this policy does: a reference policy, or a sampler.

        Args:
            dtype: of all its weights; None: as they are.
        """
        ...

    def trailing_copy(self) -> Policy:
        """A copy without gradient in which every cell has trained weights of its own, adapters included, to be changed
        in place: a reference policy that moves."""
        ...

    def sampling_copy(self, dtype: torch.dtype, earlier: Policy | None) -> Policy:
        """A copy in another precision to sample from: `earlier`, one that was made before, brought up to date where
        that can be done."""
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
