"""Step-by-step logits of growing trajectories, with cached keys and values."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from harness.policy.attention import EXPLICIT_SLOTS, attention
from harness.policy.decoder import Decoder


class Decoding:
    """Trajectories of every cell, growing by one token per step.

    Cells with equal shapes are stacked. A cell's trajectories all stay in the computation until the cell has finished, so that
    its shapes do not depend on its neighbours; what is computed for a cell that has finished is dropped.
    """

    def __init__(
        self,
        policy: Decoder,
        prompts: Sequence[Sequence[Sequence[int]]],
        group_size: int,
        max_new_tokens: int,
        plain: bool = False,
    ) -> None:
        shapes: dict[Hashable, list[int]] = {}
        for cell, listed in enumerate(prompts):
            shapes.setdefault((len(listed), max(map(len, listed))), []).append(cell)
        make = _Recomputed if plain else _Cached
        self.stacks = [
            (cells, make(policy, cells, [prompts[c] for c in cells], group_size, max_new_tokens))
            for cells in shapes.values()
        ]

    def start(self) -> dict[int, Tensor]:
        """Logits [N, V] of the first token of each trajectory, by cell."""
        found = {}
        for cells, stack in self.stacks:
            found.update(zip(cells, stack.start().unbind(0), strict=True))
        return found

    def step(self, newest: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Logits [N, V] of the next token of the cells that are still growing.

        Args:
            newest: the last token [N] of each trajectory of these cells.
        """
        found: dict[int, Tensor] = {}
        for cells, stack in self.stacks:
            if any(cell in newest for cell in cells):
                idle = torch.zeros_like(next(iter(newest.values())))
                tokens = torch.stack([newest.get(cell, idle[:0].new_zeros(stack.N)) for cell in cells])
                found.update(zip(cells, stack.step(tokens).unbind(0), strict=True))
        return {cell: found[cell] for cell in newest}


class _Cached:
    """Keys and values kept per lane: a group's (short sequences) or a trajectory's. Each prompt is forwarded once."""

    def __init__(
        self,
        policy: Decoder,
        cells: Sequence[int],
        prompts: Sequence[Sequence[Sequence[int]]],
        group_size: int,
        max_new_tokens: int,
    ) -> None:
        self.policy, self.weights = policy, policy.weights(cells)
        self.A, self.P, self.G = len(cells), len(prompts[0]), group_size
        self.N = self.P * group_size
        lengths = [[len(prompt) for prompt in listed] for listed in prompts]
        self.L = max(map(max, lengths))
        device = policy.device
        padded = [[[*prompt, *[0] * (self.L - len(prompt))] for prompt in listed] for listed in prompts]
        self.prompts = torch.tensor(padded, device=device).view(self.A, -1)
        self.lengths = torch.tensor(lengths, device=device)  # [A, P]
        self.width = group_size if self.L + group_size * max_new_tokens <= EXPLICIT_SLOTS else 1
        self.cache: list[tuple[Tensor, Tensor]] = []
        self.written = 0

    def start(self) -> Tensor:
        first = torch.arange(self.P * self.L, device=self.lengths.device).view(self.P, self.L)[:, 0]
        last = (first + self.lengths - 1) + self.P * self.L * torch.arange(self.A, device=first.device)[:, None]
        pass_ = _Prefill(self, last.view(-1))
        hidden = self.policy.hidden(self.weights, self.prompts, pass_)
        logits = self.policy.logits(self.weights, hidden)
        self.cache = pass_.cache
        if self.width == 1:
            self.cache = [(k.repeat_interleave(self.G, 0), v.repeat_interleave(self.G, 0)) for k, v in self.cache]
        inside = torch.arange(self.L, device=first.device) < self.lengths.view(-1, 1)  # [A * P, L]
        repeats = self.G // self.width
        bias = torch.zeros(inside.shape, device=first.device, dtype=self.policy.dtype).masked_fill_(~inside, -torch.inf)
        self.prompt_bias = bias.repeat_interleave(repeats, 0)[:, None].expand(-1, self.width, -1)
        own = torch.full((self.width, self.width), -torch.inf, device=first.device, dtype=self.policy.dtype)
        self.own_bias = own.fill_diagonal_(0.0)
        return logits.repeat_interleave(self.G, 1)

    def step(self, tokens: Tensor) -> Tensor:
        positions = (self.lengths + self.written).repeat_interleave(self.G, 1).view(-1, self.width)
        self.written += 1
        lanes = len(self.prompt_bias)
        own = self.own_bias.repeat(1, self.written).expand(lanes, -1, -1)
        pass_ = _Step(self, positions, torch.cat((self.prompt_bias, own), -1))
        return self.policy.logits(self.weights, self.policy.hidden(self.weights, tokens, pass_))


class _Prefill:
    """Arrangement of the prompts' own pass: a causal lane per prompt, whose keys and values are kept."""

    def __init__(self, stack: _Cached, last: Tensor) -> None:
        self.S, self.last = stack.L, last
        self.positions = torch.arange(self.S, device=last.device)[None]
        self.limit = self.S
        self.cache: list[tuple[Tensor, Tensor]] = []

    def spread(self, flat: Tensor) -> Tensor:
        return flat.view(-1, self.S, flat.shape[-1])

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.cache.append((keys, values))
        bias = torch.full((self.S, self.S), -torch.inf, device=queries.device, dtype=queries.dtype).triu_(1)
        return attention(queries, keys, values, bias[None])

    def collect(self, mixed: Tensor, cells: int, last: bool) -> Tensor:
        flat = mixed.reshape(-1, mixed.shape[-1])
        return (flat.index_select(0, self.last) if last else flat).view(cells, -1, mixed.shape[-1])

    def kept(self, flat: Tensor) -> Tensor:
        return flat.flatten(0, 1).index_select(0, self.last).view(len(flat), -1, flat.shape[-1])


class _Step:
    """Arrangement of one decoding step: one new token per trajectory, `width` trajectories per lane."""

    def __init__(self, stack: _Cached, positions: Tensor, bias: Tensor) -> None:
        self.stack, self.positions, self.bias = stack, positions, bias
        self.limit = stack.L + stack.written

    def spread(self, flat: Tensor) -> Tensor:
        return flat.view(-1, self.stack.width, flat.shape[-1])

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        old_keys, old_values = self.stack.cache[layer]
        keys, values = torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)
        self.stack.cache[layer] = (keys, values)
        return attention(queries, keys, values, self.bias)

    def collect(self, mixed: Tensor, cells: int, last: bool) -> Tensor:
        return mixed.reshape(cells, -1, mixed.shape[-1])

    def kept(self, flat: Tensor) -> Tensor:
        return flat


class _Recomputed:
    """The reference path: one lane per trajectory, its whole sequence forwarded for every new token."""

    def __init__(
        self,
        policy: Decoder,
        cells: Sequence[int],
        prompts: Sequence[Sequence[Sequence[int]]],
        group_size: int,
        max_new_tokens: int,
    ) -> None:
        self.policy, self.weights = policy, policy.weights(cells)
        self.rows = [[list(prompt) for prompt in listed for _ in range(group_size)] for listed in prompts]
        self.N = len(self.rows[0])

    def start(self) -> Tensor:
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        for rows, newest in zip(self.rows, tokens.tolist(), strict=True):
            for row, token in zip(rows, newest, strict=True):
                row.append(token)
        return self._logits()

    def _logits(self) -> Tensor:
        from harness.policy.prefixes import Grove, plain_forest

        nothing = torch.zeros((self.N, 1), dtype=torch.long)
        forests = [plain_forest(rows, torch.arange(self.N), nothing, nothing.view(-1)) for rows in self.rows]
        grove = Grove(forests, self.policy.device, self.policy.dtype)
        return self.policy.logits(self.weights, self.policy.hidden(self.weights, grove.tokens, grove))
