"""Rollouts: the trajectories of one cell that are generated together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from klab.harness.objective import Groups
from klab.harness.policy.prefix_tree import Prefixes, PrefixTree, build_prefix_tree, build_unshared


@dataclass(frozen=True, slots=True)
class HostRows:
    """What the host has to know of a rollout: tensors of its trajectories on the CPU.

    Attributes:
        tokens, mask: see `Rollout`.
        lengths: tokens of each trajectory, the policy's and the environment's.
    """

    tokens: Int[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    lengths: Int[Tensor, " N"]

    def __getitem__(self, rows: Any) -> HostRows:
        return HostRows(self.tokens[rows], self.mask[rows], self.lengths[rows])


@dataclass(slots=True)
class Rollout:
    """N = P × group_size trajectories of ONE cell, padded at the right to the longest, T tokens.

    Attributes:
        prompts: P lists of token ids.
        group_size: trajectories per prompt; trajectory i continues prompt i // group_size.
        tokens: token ids, 0 after a trajectory's end.
        mask: the tokens that the policy generated (end-of-sequence tokens included).
        present: all tokens but padding: the policy's and the environment's.
        logp: the sampler's log-probabilities of generated tokens under the tempered, full distribution
            (top-p restricts what is drawn, not what is recorded); 0 elsewhere.
        truncated: whether the limit of new tokens ended it.
        texts: N texts of generated tokens, without end-of-sequence tokens.
        known_states: what the policy that drew them keeps for an update from the same weights; no part of the rollout.
    """

    prompts: list[list[int]]
    group_size: int
    tokens: Int[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    present: Bool[Tensor, "N T"]
    logp: Float[Tensor, "N T"]
    truncated: Bool[Tensor, " N"]
    texts: list[str]
    known_states: object = field(default=None, init=False, repr=False, compare=False)
    _prefix_trees: dict[int | None, PrefixTree] = field(default_factory=dict, init=False, repr=False, compare=False)
    _prefixes: Prefixes | None = field(default=None, init=False, repr=False, compare=False)
    _on_host: HostRows | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def on_host(self) -> HostRows:
        """Some of these tensors on the CPU, copied once: each copy waits until the device has computed everything."""
        if self._on_host is None:
            self._on_host = HostRows(self.tokens.cpu(), self.mask.cpu(), self.present.sum(1).cpu())
        return self._on_host

    def to(self, device: torch.device | str) -> Rollout:
        """These trajectories on a device, without waiting for it."""
        if self.tokens.device == torch.device(device):
            return self
        names = ("tokens", "mask", "present", "logp", "truncated")
        moved = replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})
        moved._on_host = self.on_host
        return moved

    @property
    def groups(self) -> Int[Tensor, " N"]:
        """Which prompt each trajectory continues."""
        return self.grouping.index

    @property
    def grouping(self) -> Groups:
        """The trajectories by prompt."""
        return Groups.equal_sized(len(self.prompts), self.group_size, self.tokens.device)

    @classmethod
    def concatenate(cls, parts: Sequence[Rollout]) -> Rollout:
        """The trajectories of several rollouts of equal group size one after the other, padded to the longest."""
        if len(parts) == 1:
            return parts[0]
        T = max(part.tokens.shape[1] for part in parts)

        def stacked(name: str) -> Tensor:
            return torch.cat([pad(getattr(part, name), (0, T - part.tokens.shape[1])) for part in parts])

        found = cls(
            prompts=[prompt for part in parts for prompt in part.prompts],
            group_size=parts[0].group_size,
            tokens=stacked("tokens"),
            mask=stacked("mask"),
            present=stacked("present"),
            logp=stacked("logp"),
            truncated=torch.cat([part.truncated for part in parts]),
            texts=[text for part in parts for text in part.texts],
        )
        host = [part.on_host for part in parts]
        found._on_host = HostRows(
            torch.cat([pad(each.tokens, (0, T - each.tokens.shape[1])) for each in host]),
            torch.cat([pad(each.mask, (0, T - each.mask.shape[1])) for each in host]),
            torch.cat([each.lengths for each in host]),
        )
        return found

    def select_prompts(self, groups: Sequence[int] | slice) -> Rollout:
        """The trajectories of some prompts, whole groups; still padded to T."""
        every = range(len(self.prompts))
        chosen = list(every[groups]) if isinstance(groups, slice) else [every[g] for g in groups]
        G = self.group_size
        index = [g * G + i for g in chosen for i in range(G)]
        rows = torch.tensor(index, dtype=torch.long)
        at = rows.to(self.tokens.device, non_blocking=True)
        found = Rollout(
            prompts=[self.prompts[g] for g in chosen],
            group_size=G,
            tokens=self.tokens[at],
            mask=self.mask[at],
            present=self.present[at],
            logp=self.logp[at],
            truncated=self.truncated[at],
            texts=[self.texts[i] for i in index],
        )
        found._on_host = self.on_host[rows]
        return found

    def slice_rows(self, first: int, last: int) -> Rollout:
        """Some trajectories: whole groups, or part of one group; still padded to T."""
        prompts = self.prompts[first // self.group_size : -(-last // self.group_size)]
        rows = slice(first, last)
        found = Rollout(
            prompts=prompts,
            group_size=(last - first) // len(prompts),
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            present=self.present[rows],
            logp=self.logp[rows],
            truncated=self.truncated[rows],
            texts=self.texts[rows],
        )
        found._on_host = self.on_host[rows]
        return found

    def prefix_tree(self, max_shared_row: int | None) -> PrefixTree:
        """The layout of these trajectories in a forward pass, built once per argument.

        Args:
            max_shared_row: see `build_prefix_tree`; None: nothing is shared.
        """
        if max_shared_row not in self._prefix_trees:
            host = self.on_host
            groups = torch.arange(len(self.prompts)).repeat_interleave(self.group_size)
            given = self.prompts, groups, host.tokens, host.lengths
            built = build_unshared(*given) if max_shared_row is None else build_prefix_tree(*given, max_shared_row)
            self._prefix_trees[max_shared_row] = built
        return self._prefix_trees[max_shared_row]

    @property
    def prefixes(self) -> Prefixes:
        """The distinct prefixes of these trajectories, found once."""
        if self._prefixes is None:
            host = self.on_host
            groups = np.repeat(np.arange(len(self.prompts)), self.group_size)
            self._prefixes = Prefixes(len(self.prompts), groups, host.tokens.numpy(), host.lengths.numpy())
        return self._prefixes

    def to_dict(self) -> dict[str, Tensor | list[str]]:
        """A flat dictionary of CPU tensors, and the texts."""
        lengths = torch.tensor([len(prompt) for prompt in self.prompts])
        return {
            "prompt_tokens": torch.tensor([token for prompt in self.prompts for token in prompt], dtype=torch.long),
            "prompt_lengths": lengths,
            "group_size": torch.tensor(self.group_size),
            "tokens": self.tokens.cpu(),
            "mask": self.mask.cpu(),
            "present": self.present.cpu(),
            "logp": self.logp.cpu(),
            "truncated": self.truncated.cpu(),
            "texts": list(self.texts),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Tensor | list[str]], device: torch.device | str = "cpu") -> Rollout:
        """The inverse of `to_dict`."""
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        texts = [str(text) for text in values["texts"]]
        parts = torch.split(tensors["prompt_tokens"], tensors["prompt_lengths"].tolist())
        rollout = cls(
            prompts=[part.tolist() for part in parts],
            group_size=int(tensors["group_size"]),
            tokens=tensors["tokens"],
            mask=tensors["mask"],
            present=tensors["present"],
            logp=tensors["logp"],
            truncated=tensors["truncated"],
            texts=texts,
        )
        return rollout.to(device)
