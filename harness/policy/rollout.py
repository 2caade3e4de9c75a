"""Rollouts: one cell's trajectories, and how they are sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from grid.mistake import Mistake
from harness.objective import Groups
from harness.policy.policy import Policy
from harness.policy.prefixes import Forest, forest, plain_forest

Environment = Callable[[int, int, str], str | None]
"""`environment(cell, trajectory, transcript)`: the environment's answer to what was written after the prompt so far
(both sides, without end tokens), called when the policy has ended its turn; None ends the episode."""


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
        return Groups.even(len(self.prompts), self.group_size, self.tokens.device)

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


@dataclass(frozen=True, slots=True)
class Stretch:
    """The random numbers of some of a cell's trajectories: the n that follow the first `first` of `total`.

    Each step consumes one number per trajectory of the cell, so these are what they would be among all of them.
    """

    generator: torch.Generator
    first: int
    total: int


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
        Mistake: an empty prompt.
        ValueError: lists of other lengths than the policy has cells.
    """
    if not policy.cells == len(prompts) == len(generators):
        raise ValueError(f"{len(prompts)} prompt lists and {len(generators)} generators for {policy.cells} cells")
    for listed in prompts:
        if not listed or not all(listed):
            raise Mistake("a prompt is empty", key="task")
    drafts = [
        Draft(policy, cell, [list(p) for p in prompts[cell]], group_size, max_new_tokens, environment)
        for cell in range(policy.cells)
    ]
    with torch.no_grad():
        decoding = policy.steps([draft.prompts for draft in drafts], group_size, plain)
        active = list(range(policy.cells))
        logits = decoding.start()
        while active:
            for cell in active:
                tempered = logits[cell] if temperature == 1.0 else logits[cell] / temperature
                chosen, logp = draw(tempered, None if greedy else generators[cell], top_p)
                drafts[cell].write(chosen, logp)
            active = [cell for cell in active if not drafts[cell].finished]
            if active:
                newest = {cell: drafts[cell].newest for cell in active}
                logits = decoding.step(newest, {cell: drafts[cell].open for cell in active})
    return [draft.rollout() for draft in drafts]


def draw(logits: Tensor, generator: torch.Generator | Stretch | None, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens [N] drawn from logits [N, V] by inverting the cumulative distribution, and their log-probabilities [N].

    One uniform number per row is consumed, whatever the logits. None as the generator takes the most likely token.
    """
    logp = (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits).log_softmax(-1)
    if generator is None:
        chosen = logp.argmax(-1, keepdim=True)
        return chosen.squeeze(-1), logp.gather(-1, chosen).squeeze(-1)
    numbers = uniform(generator, len(logp), logp.device)
    probabilities = logp.exp().double()
    if top_p < 1.0:
        ordered, order = probabilities.sort(stable=True, dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the most likely token is never outside
        probabilities = probabilities.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
    cumulative = probabilities.cumsum(-1)
    chosen = (cumulative <= numbers * cumulative[:, -1:]).sum(-1, keepdim=True).clamp_(max=logp.shape[-1] - 1)
    return chosen.squeeze(-1), logp.gather(-1, chosen).squeeze(-1)


def uniform(generator: torch.Generator | Stretch, rows: int, device: torch.device) -> Tensor:
    """Uniform numbers [rows, 1] in float64."""
    if isinstance(generator, torch.Generator):
        return torch.rand(rows, 1, generator=generator, device=device, dtype=torch.float64)
    every = torch.rand(generator.total, 1, generator=generator.generator, device=device, dtype=torch.float64)
    return every[generator.first : generator.first + rows]


class Draft:
    """Trajectories of one cell while they are being written."""

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
        self.ends = policy.ends
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

    def write(self, tokens: Tensor, logp: Tensor) -> None:
        """One more token per open trajectory: the drawn one, or the next of an environment's answer."""
        for row, (token, value) in enumerate(zip(tokens.tolist(), logp.tolist(), strict=True)):
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
            if token in self.ends:
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
        if tokens and tokens[-1] in self.ends:
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
        answer = self.environment(self.cell, row, self._text(row, own_only=False))
        if answer is None:
            return False
        if self.spent[row] >= self.budget:
            self.truncated[row] = True
            return False
        self.answers[row] = list(self.policy.tokenizer(answer, add_special_tokens=False)["input_ids"])
        return True

    def _text(self, row: int, own_only: bool) -> str:
        pairs = zip(self.written[row], self.own[row], strict=True)
        kept = tuple(token for token, own in pairs if token not in self.ends and (own or not own_only))
        if kept not in self.decoded:
            self.decoded[kept] = str(self.policy.tokenizer.decode(list(kept), skip_special_tokens=False))
        return self.decoded[kept]

    def rollout(self) -> Rollout:
        N, T = len(self.written), max(len(row) for row in self.written)
        device = self.policy.device
        wide = torch.float64 if self.policy.dtype == torch.float64 else torch.float32

        def padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
            return torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], dtype=dtype, device=device)

        return Rollout(
            prompts=self.prompts,
            group_size=self.group_size,
            tokens=padded(self.written, torch.long),
            mask=padded(self.own, torch.bool),
            present=padded([[True] * len(row) for row in self.written], torch.bool),
            logp=padded(self.logp, wide),
            truncated=torch.tensor(self.truncated, device=device),
            texts=[self._text(row, own_only=True) for row in range(N)],
        )
