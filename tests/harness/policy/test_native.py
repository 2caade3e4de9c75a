"""The compiled layers: the numbers of the reference path as exactly as float32 can have them, the bits of a cell alone,
and a library that is built once, where there is a compiler."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.grid.errors import UserError
from klab.grid.schema.policy import Lora
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.kv_cache import KVCacheDecoder
from klab.harness.policy.stacked.native_decoding import NativeDecoder
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.harness.store.kernels import COMPILERS, NATIVE
from tests.support.native_policy import (
    BIASES,
    CELLS,
    SHAPES,
    alone,
    numbers,
    ragged_rollout,
    states_and_gradients,
    tame_policy,
    with_parameters,
)
from tests.support.tiny_policy import decoder, generators

pytestmark = [
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no compiler"),
    pytest.mark.skipif(os.environ.get(NATIVE) == "0", reason=f"{NATIVE}=0"),
]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check_numbers(policy: StackedPolicy, rollouts: list[Rollout]) -> None:
    """Against the plain path in float64, the error is of the size that the plain path has in float32.

    It may be somewhat larger for norms and biases [C, width], whose gradients are sums of 256 tokens at a time.
    """
    assert policy.native is not None
    wide = with_parameters(policy, {name: value.double() for name, value in policy.parameters.items()})
    assert wide.native is None
    exact, plain = numbers(wide, rollouts, plain=True), numbers(policy, rollouts, plain=True)
    for name, value in numbers(policy, rollouts).items():
        error, usual = ((each - exact[name]).abs().max() for each in (value, plain[name]))
        slack = 2e-6 if value.dim() == 2 else 1e-6
        assert error <= 4 * usual + slack * exact[name].abs().max(), (name, float(error), float(usual))


@pytest.mark.parametrize("cells", CELLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_and_gradients_are_as_exact_as_the_plain_paths(shape: str, cells: str) -> None:
    family, changes = SHAPES[shape]
    check_numbers(tame_policy(len(CELLS[cells]), family, **changes), CELLS[cells])


@given(st.data())
@settings(max_examples=25)
def test_numbers_and_gradients_of_any_shape(data: st.DataObject) -> None:
    kv_heads, shared = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 2, 4]))
    policy = tame_policy(
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from(["llama", "qwen2"])),
        hidden_size=16 * data.draw(st.integers(1, 5)),
        intermediate_size=16 * data.draw(st.integers(1, 5)),
        num_hidden_layers=data.draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * shared,
        head_dim=16 * data.draw(st.integers(1, 6)),
        tie_word_embeddings=data.draw(st.booleans()),
    )
    size = st.integers(1, 5)
    rollouts = [
        ragged_rollout(data.draw(st.integers(0, 99)), data.draw(size), data.draw(size), letters=data.draw(size))
        for _ in range(policy.cells)
    ]
    check_numbers(policy, rollouts)


@pytest.mark.bits
@pytest.mark.parametrize("shape", ["biases", "beyond a block", "heads of 80"])
def test_a_cell_has_the_bits_that_it_has_alone(shape: str, threads: int) -> None:
    family, changes = SHAPES[shape]
    rollouts = [*CELLS["unequal cells"], *CELLS["long"]]
    policy = tame_policy(len(rollouts), family, **changes)
    states, slopes = states_and_gradients(policy, rollouts)
    assert torch.get_num_threads() == threads
    for cell, rollout in enumerate(rollouts):
        own, own_slopes = states_and_gradients(alone(policy, cell), [rollout])
        assert torch.equal(states[cell], own[0])
        for name, value in own_slopes.items():
            assert torch.equal(slopes[name][cell], value[0]), (cell, name)


def test_gradients_twice_are_the_same_bits() -> None:
    policy, rollouts = tame_policy(2), CELLS["unequal cells"][:2]
    total = torch.stack([score.logp.sum() for score in token_scores(policy, rollouts)]).sum()
    first = torch.autograd.grad(total, list(policy.parameters.values()), retain_graph=True)
    token_scores(policy, CELLS["long"])  # another pass between
    for one, other in zip(first, torch.autograd.grad(total, list(policy.parameters.values())), strict=True):
        assert torch.equal(one, other)


def test_memory_is_given_back_and_used_again() -> None:
    policy, rollouts = tame_policy(3), CELLS["unequal cells"]
    assert policy.native is not None
    for _ in range(2):
        assert len(policy.native.pool) in (0, 3)
        total = torch.stack([score.logp.sum() for score in token_scores(policy, rollouts)]).sum()
        assert len(policy.native.pool) == 0
        total.backward()
        del total
        assert len(policy.native.pool) == 3


PROMPTS = [[[3], [4, 5]], [[6, 7, 8, 9, 10]], [[11], [12, 3], [4, 4, 4]]]


def drawn(
    policy: StackedPolicy, seeds: Sequence[int] = (0, 1, 2), plain: bool = False, keeps: bool = False
) -> list[Rollout]:
    prompts = [PROMPTS[seed] for seed in seeds]
    options = SamplingOptions(group_size=4, max_new_tokens=70, keeps_states=keeps)
    return sample(policy, prompts, generators(seeds), options, plain=plain)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("shape", ["tied", "biases", "heads of 80"])
def test_sampling_writes_what_the_plain_path_writes(shape: str, keeps: bool) -> None:
    family, changes = SHAPES[shape]
    policy = tame_policy(3, family, **changes)
    found = drawn(policy, keeps=keeps)
    lengths = torch.cat([rollout.present.sum(1) for rollout in found]).tolist()
    assert min(lengths) < 20 < max(lengths)  # some end early; caches have room for 2 × (tokens of prompts + 4 each)
    for one, other in zip(found, drawn(policy, plain=True), strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.truncated, other.truncated)
        torch.testing.assert_close(one.logp, other.logp, rtol=0, atol=2e-5)


@pytest.mark.bits
@pytest.mark.usefixtures("pack_invariant_kernels")
def test_a_cell_is_decoded_to_the_bits_that_it_has_alone() -> None:
    policy = tame_policy(3, num_key_value_heads=2)
    for cell, rollout in enumerate(drawn(policy)):
        (own,) = drawn(alone(policy, cell), [cell])
        assert torch.equal(rollout.tokens, own.tokens)
        assert torch.equal(rollout.logp, own.logp)


@pytest.mark.bits
@pytest.mark.parametrize("shape", ["biases", "beyond a block", "heads of 80"])
def test_what_decoding_keeps_has_the_bits_of_what_scoring_computes(shape: str) -> None:
    family, changes = SHAPES[shape]
    policy = tame_policy(3, family, **changes)
    kept, fresh = drawn(policy, keeps=True), drawn(policy)
    assert all(rollout.known_states is not None for rollout in kept)
    assert all(rollout.known_states is None for rollout in fresh)
    states, slopes = states_and_gradients(policy, kept)
    expected, expected_slopes = states_and_gradients(policy, fresh)
    for one, other in zip(states, expected, strict=True):
        assert torch.equal(one, other)
    _, again = states_and_gradients(policy, kept)
    for name, value in slopes.items():
        assert torch.equal(value, expected_slopes[name]), name
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize(("answer", "fits"), [("1", True), ("1+2=" * 30, False)])
def test_an_environment_may_write_more_than_there_is_room_for(answer: str, fits: bool) -> None:
    policy = tame_policy(2)

    def drawn_by(**given: bool) -> list[Rollout]:
        options = SamplingOptions(group_size=3, max_new_tokens=30, keeps_states=given.pop("keeps", False))
        turns = Counter[tuple[int, int]]()

        def environment(cell: int, trajectory: int, transcript: str) -> str | None:
            turns[cell, trajectory] += 1
            return answer if turns[cell, trajectory] < 3 else None

        return sample(policy, PROMPTS[:2], generators([0, 1]), options, environment, **given)

    kept = drawn_by(keeps=True)
    assert [rollout.known_states is not None for rollout in kept] == [fits, fits]
    assert all((rollout.present & ~rollout.mask).any() for rollout in kept)
    for one, other in zip(kept, drawn_by(plain=True), strict=True):
        assert torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.logp, other.logp, rtol=0, atol=2e-5)
    _, slopes = states_and_gradients(policy, kept)
    _, expected = states_and_gradients(policy, drawn_by())
    for name, value in slopes.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("name", ["embedding", "layers.1.qkv_bias", "norm"])
def test_what_was_kept_is_not_used_for_other_weights(name: str) -> None:
    policy = tame_policy(3, **BIASES)
    kept, fresh = drawn(policy, keeps=True), drawn(policy)
    with torch.no_grad():
        policy.parameters[name][1].mul_(1.5)
    states, _ = states_and_gradients(policy, kept)
    expected, _ = states_and_gradients(policy, fresh)
    for one, other in zip(states, expected, strict=True):
        assert torch.equal(one, other)
    kept = drawn(policy, keeps=True)
    other_policy = tame_policy(3)
    scores = zip(token_scores(other_policy, kept), token_scores(other_policy, drawn(policy)), strict=True)
    assert all(torch.equal(score.logp, anew.logp) for score, anew in scores)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_reaches_the_log_probabilities(value: float) -> None:
    rollouts = CELLS["unequal cells"]
    for name in tame_policy(1, **BIASES).parameters:
        policy = tame_policy(3, **BIASES)
        with torch.no_grad():
            policy.parameters[name][1].view(-1)[-1] = value
        scores = token_scores(policy, rollouts)
        assert all(score.logp.isfinite().all() for score in (scores[0], scores[2])), name
        if name not in ("embedding", "head"):
            assert torch.equal(scores[1].logp.isnan(), rollouts[1].mask), name


def test_a_token_that_is_no_number_reaches_what_comes_after_it() -> None:
    policy, rollout, bad = tame_policy(), CELLS["many tokens"][0], 7
    with torch.no_grad():
        policy.parameters["embedding"][0, bad, 3] = torch.nan
    logp = token_scores(policy, [rollout])[0].logp
    for row, group in enumerate(rollout.groups.tolist()):
        own = rollout.tokens[row, : int(rollout.present[row].sum())].tolist()
        expected = [bad in rollout.prompts[group] + own[:t] for t in range(len(own))]
        assert logp[row, : len(own)].isnan().tolist() == expected


@pytest.mark.parametrize("plain", [False, True])
def test_tokens_outside_the_vocabulary_are_refused(plain: bool) -> None:
    policy, rollout = tame_policy(), ragged_rollout(0)
    rollout.prompts[0][0] = policy.vocab_size
    with pytest.raises(IndexError), torch.no_grad():
        token_scores(policy, [rollout], plain=plain)


def test_sequences_beyond_the_context_are_refused() -> None:
    policy = tame_policy(max_position_embeddings=12)
    fits, exceeds = (ragged_rollout(0, 1, 2, (5, 5), (length, length)) for length in (8, 9))
    assert torch.equal(token_scores(policy, [fits])[0].logp < 0, fits.mask)  # the last token is not read
    with pytest.raises(UserError, match="13 tokens exceed the model's context"):
        token_scores(policy, [exceeds])
    options = SamplingOptions(group_size=8, max_new_tokens=100)
    with pytest.raises(UserError, match="exceed the model's context"):
        sample(policy, [[[3, 4, 5]]], generators([0]), options)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"head_dim": 16}),
        ("llama", {"head_dim": 12}),
        ("llama", {"head_dim": 272}),
        ("llama", {"head_dim": 16, "hidden_size": 40}),
        ("llama", {"head_dim": 16, "intermediate_size": 40}),
    ],
    ids=["norms on heads", "heads of 12", "heads of 272", "hidden states of 40", "intermediate 40"],
)
def test_other_architectures_are_computed_by_the_other_path(family: str, changes: dict[str, Any]) -> None:
    policy = decoder(2, family, **changes)
    assert policy.native is None
    rollouts = CELLS["one token"]
    for one, other in zip(token_scores(policy, rollouts), token_scores(policy, rollouts, plain=True), strict=True):
        torch.testing.assert_close(one.logp, other.logp, rtol=0, atol=1e-4)


def test_other_weights_are_computed_by_the_other_path() -> None:
    policy, rollouts = tame_policy(), CELLS["all different"]
    expected = token_scores(policy, rollouts)[0].logp
    wide = with_parameters(policy, {name: value.double() for name, value in policy.parameters.items()})
    thrifty = alone(policy, 0)
    thrifty.gradient_checkpointing = True
    for other in (wide, policy.with_lora(Lora(rank=2), [0]), thrifty):
        assert other.native is None
        assert type(other.decoder([[[3]]], 1)) is KVCacheDecoder
        torch.testing.assert_close(token_scores(other, rollouts)[0].logp.to(expected), expected, rtol=0, atol=1e-5)
    thrifty.gradient_checkpointing = False
    assert thrifty.native is not None
    assert type(thrifty.decoder([[[3]]], 1)) is NativeDecoder
