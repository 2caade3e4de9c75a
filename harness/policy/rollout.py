"""Rollouts: one cell's trajectories, and how they are sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import pad

from klab.harness.objective import Groups
from klab.harness.policy.sampling.trajectory_builder import TrajectoryBuilder
from klab.harness.policy.stacked.prefix_tree import PrefixTree, build_prefix_tree, unshared_tree


@dataclass(slots=True)
class Rollout:
    """ONE cell's N = P × group_size trajectories; T is the longest of them.

    Attributes:
        prompts: P lists of token ids.
        group_size: trajectories per prompt; trajectory i continues prompt i // group_size.
        tokens: int64 [N, T], 0 after a trajectory's end.
        mask: bool [N, T], the policy's own tokens (its end tokens among them).
        present: bool [N, T], own and environment tokens: all but padding.
        logp: float [N, T], the sampler's log-probabilities of own tokens under the tempered, full distribution (top-p
            restricts what is drawn, not what is recorded); 0 elsewhere.
        truncated: bool [N], the budget of own tokens ended it.
        texts: N texts of own tokens, without end tokens.
    """

    prompts: list[list[int]]
    group_size: int
    tokens: Tensor
    mask: Tensor
    present: Tensor
    logp: Tensor
    truncated: Tensor
    texts: list[str]
    _prefix_trees: dict[bool, PrefixTree] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def groups(self) -> Tensor:
        """int64 [N], which prompt each trajectory continues."""
        return self.grouping.index

    @property
    def grouping(self) -> Groups:
        """The trajectories by prompt."""
        return Groups.equal_sized(len(self.prompts), self.group_size, self.tokens.device)

    @classmethod
    def of(cls, draft: TrajectoryBuilder) -> Rollout:
        """The trajectories of a finished draft."""
        device = draft.policy.device
        wide = torch.float64 if draft.policy.dtype == torch.float64 else torch.float32
        lengths = torch.tensor([len(row) for row in draft.written], device=device)
        present = torch.arange(int(lengths.max()), device=device) < lengths[:, None]

        def padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
            values = torch.tensor(list(chain.from_iterable(rows)), dtype=dtype, device=device)
            return torch.zeros(present.shape, dtype=dtype, device=device).masked_scatter_(present, values)

        return cls(
            prompts=draft.prompts,
            group_size=draft.group_size,
            tokens=padded(draft.written, torch.long),
            mask=padded(draft.own, torch.bool),
            present=present,
            logp=padded(draft.logp, wide),
            truncated=torch.tensor(draft.truncated, device=device),
            texts=[draft.text(row, own_only=True) for row in range(len(draft.written))],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Rollout]) -> Rollout:
        """The trajectories of several rollouts of equal group size one after the other, padded to the longest."""
        if len(parts) == 1:
            return parts[0]
        T = max(part.tokens.shape[1] for part in parts)

        def stacked(name: str) -> Tensor:
            return torch.cat([pad(getattr(part, name), (0, T - part.tokens.shape[1])) for part in parts])

        return cls(
            prompts=[prompt for part in parts for prompt in part.prompts],
            group_size=parts[0].group_size,
            tokens=stacked("tokens"),
            mask=stacked("mask"),
            present=stacked("present"),
            logp=stacked("logp"),
            truncated=torch.cat([part.truncated for part in parts]),
            texts=[text for part in parts for text in part.texts],
        )

    def select_prompts(self, groups: Sequence[int] | slice) -> Rollout:
        """The trajectories of some prompts, whole groups; T stays, even where the longest of them is shorter."""
        every = range(len(self.prompts))
        chosen = list(every[groups]) if isinstance(groups, slice) else [every[g] for g in groups]
        G = self.group_size
        index = [g * G + i for g in chosen for i in range(G)]
        at = torch.tensor(index, dtype=torch.long, device=self.tokens.device)
        return Rollout(
            prompts=[self.prompts[g] for g in chosen],
            group_size=G,
            tokens=self.tokens[at],
            mask=self.mask[at],
            present=self.present[at],
            logp=self.logp[at],
            truncated=self.truncated[at],
            texts=[self.texts[i] for i in index],
        )

    def prefix_tree(self, plain: bool = False) -> PrefixTree:
        """How these trajectories are laid out in a forward pass; made once."""
        if plain not in self._prefix_trees:
            make = unshared_tree if plain else build_prefix_tree
            lengths = self.present.sum(1).cpu()
            self._prefix_trees[plain] = make(self.prompts, self.groups.cpu(), self.tokens.cpu(), lengths)
        return self._prefix_trees[plain]

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
        return cls(
            prompts=[part.tolist() for part in parts],
            group_size=int(tensors["group_size"]),
            tokens=tensors["tokens"].to(device),
            mask=tensors["mask"].to(device),
            present=tensors["present"].to(device),
            logp=tensors["logp"].to(device),
            truncated=tensors["truncated"].to(device),
            texts=texts,
        )
