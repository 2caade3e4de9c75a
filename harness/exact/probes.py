"""The probe update: one fixed update on which different objectives have different gradients; and fingerprints of them.

Its groups cover what can distinguish two objectives: no drift, mild drift and strong drift, ragged lengths, a
trajectory without own tokens, environment tokens between own ones, and rewards that are mixed, binary, all equal or all
negative. A further block (the comb) has one-token trajectories with log-ratios densely in [-3, 3] and sparsely out to
6, with advantages of both signs, so that every threshold of a weight has ratios on both sides and no weight is 0 or 1
everywhere. For an on-policy schedule it is the same update with every log-ratio to the behaviour policy set to 0.

The fingerprint is the gradient of the loss with respect to the logits (through the log-probabilities and, for `full`,
directly), summarised block by block: its norm and its products with `PROJECTIONS` fixed random directions. V is 0 in
it: cells with a critic are never merged by measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from klab.grid import Objective
from klab.harness.exact.estimators import loss_gradients
from klab.harness.objective import TokenBatch, axis_functions
from klab.harness.objective.kl import entropy

VOCABULARY, POSITIONS, GROUP_SIZE = 4, 6, 4
PROJECTIONS = 3
MAX_NEW_TOKENS = 9

_REWARDS = (
    (1.0, 0.0, 0.0, 1.0),  # binary, mixed
    (0.5, -1.25, 2.0, 0.125),  # mixed signs
    (-0.5, -2.0, -0.25, -1.0),  # all negative
    (1.0, 1.0, 1.0, 1.0),  # all equal: a group without information
    (0.0, 0.0, 0.0, 0.0),
    (-1.0, 1.0, 1.0, 1.0),
)
_LENGTHS = ((6, 3, 1, 5), (4, 6, 2, 6), (0, 5, 6, 3), (6, 2, 4, 5), (3, 6, 5, 1), (6, 6, 6, 6))
_DRIFTS = (0.0, 0.05, 1.0)
_COMB = 96
_TERM_WEIGHT = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """The probe update, and its blocks, which are compared separately.

    Attributes:
        batch: the update; its log-probabilities belong to its logits.
        scores: gradient of each token's log-probability with respect to its logits.
        blocks: the row ranges.
        directions: the random directions of the projections.
    """

    batch: TokenBatch
    scores: Float64[Tensor, "N T V"]
    blocks: tuple[slice, ...]
    directions: Float64[Tensor, "projections N T V"]


@lru_cache(maxsize=2)
def probe(on_policy: bool) -> Probe:
    """The probe update of on-policy or of off-policy schedules. Deterministic."""
    generator = torch.Generator().manual_seed(20240607)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    masks: list[Tensor] = []
    rewards: list[Tensor] = []
    drifts: list[Tensor] = []
    blocks: list[slice] = []
    for drift in _DRIFTS:
        start = 4 * len(masks)
        for group_rewards, lengths in zip(_REWARDS, _LENGTHS, strict=True):
            masks.append(_ragged_mask(lengths, generator))
            rewards.append(torch.tensor(group_rewards, dtype=torch.float64))
            drifts.append(drift * normal(GROUP_SIZE, POSITIONS))
        blocks.append(slice(start, 4 * len(masks)))
    comb, comb_rewards = _comb(generator)
    start = 4 * len(masks)
    for index in range(0, _COMB, GROUP_SIZE):
        mask = torch.zeros(GROUP_SIZE, POSITIONS, dtype=torch.bool)
        mask[:, 0] = True
        masks.append(mask)
        rewards.append(comb_rewards[index : index + GROUP_SIZE])
        drifts.append(comb[index : index + GROUP_SIZE, None].expand(-1, POSITIONS))
    blocks.append(slice(start, 4 * len(masks)))

    mask = torch.cat(masks)
    rows = mask.shape[0]
    logits = normal(rows, POSITIONS, VOCABULARY)
    logits_reference = logits + 0.7 * normal(rows, POSITIONS, VOCABULARY)
    tokens = torch.randint(VOCABULARY, (rows, POSITIONS), generator=generator)
    logp = torch.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]
    logp_reference = torch.log_softmax(logits_reference, -1).gather(-1, tokens[..., None])[..., 0]
    log_ratio = torch.zeros_like(logp) if on_policy else torch.cat(drifts)
    groups = torch.arange(rows) // GROUP_SIZE
    all_rewards = torch.cat(rewards)
    second = torch.randn(rows, generator=torch.Generator().manual_seed(20260105), dtype=torch.float64)
    batch = TokenBatch(
        logp=logp * mask,
        logp_behaviour=(logp - log_ratio) * mask,
        logp_reference=logp_reference * mask,
        mask=mask,
        rewards=all_rewards,
        groups=groups,
        max_new_tokens=MAX_NEW_TOKENS,
        logits=logits,
        logits_reference=logits_reference,
        greedy_rewards=normal(rows // GROUP_SIZE)[groups],
        entropy=entropy(logits),
        reward_terms=torch.stack([all_rewards - _TERM_WEIGHT * second, second], 1),
        term_weights=(1.0, _TERM_WEIGHT),
    )
    scores = torch.nn.functional.one_hot(tokens, VOCABULARY) - torch.softmax(logits, -1)
    return Probe(batch, scores, tuple(blocks), normal(PROJECTIONS, rows, POSITIONS, VOCABULARY))


def _ragged_mask(lengths: tuple[int, ...], generator: torch.Generator) -> Bool[Tensor, "G T"]:
    """Own tokens at random positions, so that environment tokens lie before, between and after them."""
    order = torch.rand(len(lengths), POSITIONS, generator=generator).argsort(-1)
    return order < torch.tensor(lengths)[:, None]


def _comb(generator: torch.Generator) -> tuple[Float64[Tensor, " comb"], Float64[Tensor, " comb"]]:
    """Log-ratios, dense near 0 and sparse to +-6, shuffled, with rewards of both signs in every group."""
    inner = torch.linspace(-3.0, 3.0, _COMB - 8, dtype=torch.float64)
    outer = torch.tensor([-6.0, -5.0, -4.2, -3.5, 3.4, 4.1, 5.0, 6.0], dtype=torch.float64)
    log_ratios = torch.cat([inner, outer])[torch.randperm(_COMB, generator=generator)]
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(_COMB // 2)
    return log_ratios, signs * (0.5 + torch.rand(_COMB, generator=generator, dtype=torch.float64))


def probe_gradient(objective: Objective, on_policy: bool) -> Float64[Tensor, "N T V"]:
    """Gradient of the loss with respect to every logit of the probe update."""
    lab = probe(on_policy)
    batch = lab.batch
    if objective.entropy_bonus:
        batch = batch.replace(entropy=None)  # that of the logits, with gradient
    elif "logits" not in axis_functions(objective).needs:
        batch = batch.replace(logits=None, logits_reference=None)
    logp_gradient, logits_gradient, _ = loss_gradients(objective, batch)
    total = logp_gradient[..., None] * lab.scores
    return total if logits_gradient is None else total + logits_gradient


def fingerprint(objective: Objective, on_policy: bool) -> list[float]:
    """Norm and projections of the probe gradient, block by block; non-finite entries stay as they are."""
    lab = probe(on_policy)
    gradient = probe_gradient(objective, on_policy)
    marks: list[Tensor] = []
    for block in lab.blocks:
        part = gradient[block].flatten()
        marks.append(part.norm()[None])
        marks.append(lab.directions[:, block].flatten(1) @ part)
    numbers: list[float] = torch.cat(marks).tolist()
    return numbers
