"""Trajectories under construction, token by token or turn by turn, with the environment's answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from klab.harness.policy.categorical import UniformTable
from klab.harness.policy.policy import Continuation, DrawnBlock, Policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sampler import Environment, SamplingOptions, TranscribingEnvironment
from klab.harness.policy.special_tokens import answer_tokens, trailing_special_tokens


class TrajectoryBuilder:
    """The N = P × group_size trajectories of one cell while they are generated. Every list has an entry for each.

    Args:
        cell: index that the environment is asked with.
        prompts: token ids [P][length].

    Attributes:
        unfinished: whether it goes on.
        num_generated: number of tokens that the policy generated.
        truncated: whether the limit of new tokens ended it.
        tokens: token ids, the policy's and the environment's.
        generated: which of them the policy generated.
        logp: their log-probabilities, 0 for those of the environment.
    """

    def __init__(
        self,
        policy: Policy,
        cell: int,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        environment: Environment | None,
    ) -> None:
        self.policy, self.cell, self.options, self.environment = policy, cell, options, environment
        self.prompts = [list(prompt) for prompt in prompts]
        self._transcribed = isinstance(environment, TranscribingEnvironment) and cell in environment.transcribed
        self.eos_token_ids = policy.eos_token_ids
        self._trailing = trailing_special_tokens(policy.tokenizer)
        N = len(prompts) * options.group_size
        self.unfinished = [True] * N
        self.num_generated = [0] * N
        self.truncated = [False] * N
        self.tokens: list[list[int]] = [[] for _ in range(N)]
        self.generated: list[list[bool]] = [[] for _ in range(N)]
        self.logp: list[list[float]] = [[] for _ in range(N)]
        self._answers: list[list[int]] = [[] for _ in range(N)]  # the environment's tokens that are still to be added
        self._decoded: dict[tuple[int, ...], str] = {}  # many trajectories are equal

    @property
    def finished(self) -> bool:
        return not any(self.unfinished)

    @property
    def last_tokens(self) -> Tensor:
        """int64 [N], the last token of each trajectory."""
        return torch.tensor([tokens[-1] for tokens in self.tokens]).to(self.policy.device, non_blocking=True)

    def add_tokens(self, sampled: Iterable[tuple[int, float]]) -> None:
        """Add a token to every unfinished trajectory: the next of the environment's answer, else the sampled one.

        Args:
            sampled: a token and its log-probability for each of the N trajectories.
        """
        for i, (token, logp) in enumerate(sampled):
            if self.unfinished[i]:
                self._add_token(i, token, logp)

    def add_block(self, drawn: DrawnBlock) -> None:
        """Add the tokens of a block to every unfinished trajectory, at most up to the end of its turn."""
        for i, (tokens, logps) in enumerate(zip(drawn.tokens.T.tolist(), drawn.logp.T.tolist(), strict=True)):
            for token, logp in zip(tokens, logps, strict=True):
                if not self.unfinished[i] or self._add_token(i, token, logp):
                    break

    def _add_token(self, i: int, token: int, logp: float) -> bool:
        """Add the next token of the environment's answer, else the sampled one; whether it ends a turn."""
        if self._answers[i]:
            self.tokens[i].append(self._answers[i].pop(0))
            self.generated[i].append(False)
            self.logp[i].append(0.0)
            return False
        self.tokens[i].append(token)
        self.generated[i].append(True)
        self.logp[i].append(logp)
        self.num_generated[i] += 1
        if token in self.eos_token_ids:
            self.unfinished[i] = self._environment_answers(i)
            return True
        if self.num_generated[i] >= self.options.max_new_tokens:
            self.unfinished[i], self.truncated[i] = False, True
        return False

    def continuation(self, uniforms: UniformTable | None, steps: int) -> Continuation:
        """Where the trajectories stand.

        Args:
            uniforms: the random numbers of this cell; None where nothing is drawn.
            steps: of the next block, at most.
        """
        num_tokens = [len(tokens) for tokens in self.tokens]
        prompts = [prompt for prompt in self.prompts for _ in range(self.options.group_size)]
        left = [
            self.options.max_new_tokens - generated + len(answer)
            for generated, answer, goes_on in zip(self.num_generated, self._answers, self.unfinished, strict=True)
            if goes_on
        ]
        return Continuation(
            last_tokens=[(tokens or prompt)[-1] for tokens, prompt in zip(self.tokens, prompts, strict=True)],
            num_tokens=num_tokens,
            unfinished=self.unfinished,
            forced=self._answers,
            most=max(left),
            uniforms=None if uniforms is None else uniforms.numbers(num_tokens, steps),
        )

    def add_turn(self, i: int, tokens: Sequence[int], logp: Sequence[float]) -> None:
        """Add a whole turn of the policy to an unfinished trajectory, and the environment's answer to it.

        A turn without an end-of-sequence token was cut off, by the limit of new tokens or the model's context: the
        trajectory is truncated.
        """
        self.tokens[i] += tokens
        self.generated[i] += [True] * len(tokens)
        self.logp[i] += logp
        self.num_generated[i] += len(tokens)
        if tokens and tokens[-1] in self.eos_token_ids:
            self.unfinished[i] = self._environment_answers(i)
            self.tokens[i] += self._answers[i]
            self.generated[i] += [False] * len(self._answers[i])
            self.logp[i] += [0.0] * len(self._answers[i])
            self._answers[i] = []
        else:
            self.unfinished[i], self.truncated[i] = False, True

    def _environment_answers(self, i: int) -> bool:
        """Ask the environment after a turn; whether the trajectory goes on."""
        if self.environment is None:
            return False
        answer = self.environment(self.cell, i, self._text(i, generated_only=False))
        if answer is None:
            return False
        if self.num_generated[i] >= self.options.max_new_tokens:
            self.truncated[i] = True
            return False
        self._answers[i] = list(self.policy.tokenizer(answer, add_special_tokens=False)["input_ids"])
        return True

    def _text(self, i: int, generated_only: bool) -> str:
        """A trajectory's text without end-of-sequence tokens, and without other special tokens at its end."""
        pairs = zip(self.tokens[i], self.generated[i], strict=True)
        wanted = (token for token, generated in pairs if generated or not generated_only)
        shown = answer_tokens(wanted, self.eos_token_ids, self._trailing)
        if shown not in self._decoded:
            self._decoded[shown] = str(self.policy.tokenizer.decode(list(shown), skip_special_tokens=False))
        return self._decoded[shown]

    def build(self) -> Rollout:
        """The trajectories as a rollout."""
        logp_dtype = torch.float64 if self.policy.dtype == torch.float64 else torch.float32
        lengths = torch.tensor([len(tokens) for tokens in self.tokens])
        present = torch.arange(int(lengths.max())) < lengths[:, None]

        def padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
            values = torch.tensor(list(chain.from_iterable(rows)), dtype=dtype)
            return torch.zeros(present.shape, dtype=dtype).masked_scatter_(present, values)

        built = Rollout(
            prompts=self.prompts,
            group_size=self.options.group_size,
            tokens=padded(self.tokens, torch.long),
            mask=padded(self.generated, torch.bool),
            present=present,
            logp=padded(self.logp, logp_dtype),
            truncated=torch.tensor(self.truncated),
            texts=[self._text(i, generated_only=not self._transcribed) for i in range(len(self.tokens))],
        )
        return built.to(self.policy.device)
