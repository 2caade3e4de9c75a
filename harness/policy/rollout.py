"""Rollouts: one cell's trajectories, and how they are sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
from torch import Tensor
from torch.nn.functional import pad

from klab.grid.errors import UserError
from klab.harness.objective import Groups
from klab.harness.policy.policy import Policy
from klab.harness.policy.sampling.categorical import Stretch, draw, uniform
from klab.harness.policy.sampling.trajectory_builder import Draft, Environment
from klab.harness.policy.stacked.prefix_tree import Forest, forest, plain_forest

TOGETHER = 2**22
"""Logits of several cells are drawn from in one call as long as there are no more of them than this."""


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
    _forests: dict[bool, Forest] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def groups(self) -> Tensor:
        """int64 [N], which prompt each trajectory continues."""
        return self.grouping.index

    @property
    def grouping(self) -> Groups:
        """The trajectories by prompt."""
        return Groups.equal_sized(len(self.prompts), self.group_size, self.tokens.device)

    @classmethod
    def of(cls, draft: Draft) -> Rollout:
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
    def joined(cls, parts: Sequence[Rollout]) -> Rollout:
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

    def rows(self, groups: Sequence[int] | slice) -> Rollout:
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

    def forest(self, plain: bool = False) -> Forest:
        """How these trajectories are laid out in a forward pass; made once."""
        if plain not in self._forests:
            make = plain_forest if plain else forest
            lengths = self.present.sum(1).cpu()
            self._forests[plain] = make(self.prompts, self.groups.cpu(), self.tokens.cpu(), lengths)
        return self._forests[plain]

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


def sample(
    policy: Policy,
    prompts: Sequence[Sequence[Sequence[int]]],
    *,
    group_size: int,
    max_new_tokens: int,
    generators: Sequence[torch.Generator | Stretch],
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = False,
    environment: Environment | None = None,
    plain: bool = False,
) -> list[Rollout]:
    """Sample `group_size` trajectories of every prompt of every cell.

    Each cell draws from its own generator, once per step for all of its trajectories, until all of them have ended.

    Args:
        prompts: token ids [C][P][length]; every cell has as many prompts as it likes, at least one, none of them empty.
        max_new_tokens: budget of own tokens per trajectory, its end tokens included.
        generators: one per cell, on the policy's device; not used with `greedy`.
        temperature: divides the logits.
        top_p: draw from the smallest set of most likely tokens that holds this much probability.
        environment: answers when the policy ends a turn; without it, the end token ends the trajectory.
        plain: the reference path: every trajectory on its own, its whole sequence forwarded anew for every token.

    Raises:
        UserError: an empty prompt.
        ValueError: lists of other lengths than the policy has cells.
    """
    if not policy.cells == len(prompts) == len(generators):
        raise ValueError(f"{len(prompts)} prompt lists and {len(generators)} generators for {policy.cells} cells")
    for listed in prompts:
        if not listed or not all(listed):
            raise UserError("a prompt is empty", key="task")
    drafts = [
        Draft(policy, cell, [list(p) for p in prompts[cell]], group_size, max_new_tokens, environment)
        for cell in range(policy.cells)
    ]
    with torch.no_grad():
        decoding = policy.steps([draft.prompts for draft in drafts], group_size, plain)
        active = list(range(policy.cells))
        logits = decoding.start()
        while active:
            together = sum(logits[cell].numel() for cell in active) <= TOGETHER
            for cells in [active] if together else [[cell] for cell in active]:
                rows = torch.cat([logits[cell] for cell in cells])
                numbers = [uniform(generators[cell], len(logits[cell]), rows.device) for cell in cells if not greedy]
                tempered = rows if temperature == 1.0 else rows / temperature
                chosen, logp = draw(tempered, torch.cat(numbers) if numbers else None, top_p)
                drawn = zip(chosen.tolist(), logp.tolist(), strict=True)
                for cell in cells:
                    drafts[cell].write(islice(drawn, len(logits[cell])))
            active = [cell for cell in active if not drafts[cell].finished]
            if active:
                newest = {cell: drafts[cell].newest for cell in active}
                logits = decoding.step(newest, {cell: drafts[cell].open for cell in active})
    return [Rollout.of(draft) for draft in drafts]
