"""Adapters over one frozen base: what PEFT computes, one copy of the base, the same bits alone and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from klab.grid.errors import UserError
from klab.grid.schema.policy import HfPolicy, Lora
from klab.harness.policy.load import load_policy
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.scores import token_scores
from klab.harness.policy.stacked.lora import low_rank_products
from klab.harness.policy.stacked.policy import StackedPolicy
from tests.support.tiny_policy import configuration, decoder, generators, written

PROMPTS = [[3, 4, 5], [6, 7], [8]]
ROWS = torch.randint(3, 15, (3, 20), generator=torch.Generator().manual_seed(1))
SETTINGS: dict[str, tuple[str, dict[str, Any], Lora]] = {
    "llama": ("llama", {}, Lora(rank=4, alpha=6.0)),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}, Lora(rank=3, alpha=8)),
    "tied": ("qwen2", {"tie_word_embeddings": True}, Lora(rank=2, targets=("v_proj", "q_proj", "up_proj"))),
    "qwen3": ("qwen3", {"num_key_value_heads": 2}, Lora(rank=2, targets=("o_proj", "down_proj"))),
}


def adapted(
    section: Lora, seeds: list[int], family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any
) -> StackedPolicy:
    """Cells whose adapters have moved away from their start, each by its seed."""
    policy = decoder(1, family, dtype, **changes).with_lora(section, seeds)
    with torch.no_grad():
        for name, value in policy.parameters.items():
            for cell, seed in zip(value, seeds, strict=True):
                if name.endswith(".B"):
                    draw = torch.Generator().manual_seed(seed)
                    cell.copy_(0.3 * torch.randn(cell.shape, generator=draw, dtype=value.dtype))
    return policy


def logits(policy: StackedPolicy, plain: bool = False) -> Tensor:
    """[3, 19, V], after every token but the last of `ROWS`."""
    rollout = written([row[:1] for row in ROWS.tolist()], [row[1:] for row in ROWS.tolist()])
    with torch.no_grad():
        found = token_scores(policy, [rollout] * policy.cells, logits=True, plain=plain)[-1].logits
    assert found is not None
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_loads_the_folder_and_computes_the_same(name: str, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel

    family, changes, section = SETTINGS[name]
    decoder(1, family, **changes).save(tmp_path / "base", 0)
    policy = adapted(section, [5, 9], family, **changes)
    policy.origin = str(tmp_path / "base")
    policy.save(tmp_path / "cell", 1)
    expected = logits(policy)
    assert (expected - logits(policy.frozen_copy())).abs().max() == 0
    assert (expected - logits(StackedPolicy.from_pretrained(tmp_path / "base"))).abs().max() > 0.1

    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "cell").eval()
    trained = {n.split(".")[-4 if "lora" in n else -2] for n in whole.state_dict() if "lora_" in n}
    assert len(trained) == (7 if section.targets == "all-linear" else len(section.targets))
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "cell").eval()
    merged = whole.merge_and_unload()
    for model in (alone, merged):
        with torch.no_grad():
            torch.testing.assert_close(model(ROWS).logits[:, :-1], expected, rtol=0, atol=2e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "cell")("12+3=")["input_ids"] == [4, 5, 13, 6, 14]


def test_the_merged_weights_are_the_same_policy() -> None:
    for family, changes, section in SETTINGS.values():
        policy = adapted(section, [2], family, torch.float64, **changes)
        assert policy.adapters is not None
        base = {name: value[0] for name, value in policy.shared.items()}
        whole = policy.adapters.merge(base, {name: value[0] for name, value in policy.parameters.items()})
        dense = StackedPolicy(policy.config, policy.tokenizer, {name: value[None] for name, value in whole.items()})
        torch.testing.assert_close(logits(dense), logits(policy), rtol=0, atol=1e-12)


def test_a_saved_cell_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    section = Lora(rank=4)
    policy, other = adapted(section, [1, 2]), decoder(1).with_lora(section, [3, 4, 5])
    policy.save(tmp_path, 1)
    before = {name: value.detach().clone() for name, value in other.parameters.items()}
    other.load(tmp_path, 2)
    for name, value in other.parameters.items():
        assert torch.equal(value[2], policy.parameters[name][1])
        assert torch.equal(value[:2], before[name][:2])
    with pytest.raises(UserError, match=r"rank, alpha, targets\) \(4, 32"):
        decoder(1).with_lora(Lora(rank=8), [0]).load(tmp_path, 0)
    with pytest.raises(UserError, match="no adapters"):
        other.load(tmp_path / "nowhere", 0)


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule() -> None:
    """With W' = W + s·A·B: dA = s·dW'·Bᵀ and dB = s·Aᵀ·dW'."""
    for family, changes, section in SETTINGS.values():
        policy = adapted(section, [2], family, torch.float64, **changes)
        assert policy.adapters is not None
        base = {name: value[0] for name, value in policy.shared.items()}
        whole = policy.adapters.merge(base, {name: value[0] for name, value in policy.parameters.items()})
        dense = StackedPolicy(
            policy.config, policy.tokenizer, {name: value[None].requires_grad_() for name, value in whole.items()}
        )
        rollout = written(PROMPTS, [[5, 6, 7, 1], [5, 6, 1], [9], [9, 3, 4, 4, 1], [1], [7, 7]], dtype=torch.float64)
        for model in (policy, dense):
            score = token_scores(model, [rollout])[0].logp
            (torch.linspace(-1, 2, score.numel(), dtype=torch.float64).view(score.shape) * score).sum().backward()
        checked = 0
        for layer in range(2):
            for matrix, parts in {"qkv": "qkv", "out": "o", "gate_up": ["gate", "up"], "down": ["down"]}.items():
                grad = dense.parameters[f"layers.{layer}.{matrix}"].grad
                assert grad is not None
                names = [f"{part}_proj" for part in parts]
                widths = [policy.adapters.sizes[name][1] for name in names]
                for name, piece in zip(names, grad[0].split(widths, -1), strict=True):
                    if name not in policy.adapters.targets:
                        continue
                    down, up = (policy.parameters[f"layers.{layer}.{name}.{end}"] for end in "AB")
                    scale = section.alpha / section.rank
                    torch.testing.assert_close(down.grad[0], scale * piece @ up[0].T, rtol=0, atol=1e-11)
                    torch.testing.assert_close(up.grad[0], scale * down[0].T @ piece, rtol=0, atol=1e-11)
                    checked += 1
        assert checked == len(policy.parameters) // 2


def life(
    section: Lora, seeds: list[int], checkpointing: bool = False, family: str = "llama"
) -> list[tuple[Rollout, Tensor, list[Tensor]]]:
    """Rollout, scores and gradients of every cell of a pack."""
    pack = adapted(section, seeds, family, num_key_value_heads=2)
    pack.gradient_checkpointing = checkpointing
    prompts = [[[3 + seed, 4, 5][: 1 + seed % 3], [6, 7]] for seed in seeds]
    rollouts = sample(pack, prompts, generators(seeds), SamplingOptions(group_size=4, max_new_tokens=5))
    scores = token_scores(pack, rollouts)
    torch.autograd.backward([(s.logp * torch.linspace(-1, 2, s.logp.shape[1])).sum() for s in scores])
    return [
        (rollout, score.logp.detach(), [v.grad[c] for v in pack.parameters.values() if v.grad is not None])
        for c, (rollout, score) in enumerate(zip(rollouts, scores, strict=True))
    ]


@pytest.mark.bits
@pytest.mark.usefixtures("pack_invariant_kernels")
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("seeds", [[0, 1], [4, 0, 3], [1, 4, 7]])
def test_bits_do_not_depend_on_the_pack(seeds: list[int], family: str, rank: int) -> None:
    section = Lora(rank=rank)
    for seed, (rollout, logp, gradients) in zip(seeds, life(section, seeds, family=family), strict=True):
        alone, alone_logp, alone_gradients = life(section, [seed], family=family)[0]
        assert torch.equal(rollout.tokens, alone.tokens)
        assert torch.equal(rollout.logp, alone.logp)
        assert torch.equal(logp, alone_logp)
        assert len(gradients) == 2 * 2 * 7
        assert all(torch.equal(mine, other) for mine, other in zip(gradients, alone_gradients, strict=True))


def test_cells_start_as_their_base_and_by_their_seed() -> None:
    base = decoder(1)
    policy = base.with_lora(Lora(rank=4), [7, 8])
    again = base.with_lora(Lora(rank=4), [8])
    assert torch.equal(logits(policy), logits(policy.frozen_copy()))
    torch.testing.assert_close(logits(policy), logits(base))
    for name, value in policy.parameters.items():
        assert value.is_leaf
        assert value.requires_grad
        assert torch.equal(value[1], again.parameters[name][0])
        if name.endswith(".A"):
            assert not torch.equal(value[0], value[1])
            bound = value.shape[1] ** -0.5
            assert 0.8 * bound < value.abs().max() <= bound


def test_the_base_exists_once() -> None:
    base = decoder(1)
    policy = base.with_lora(Lora(rank=2), [0, 1, 2])
    assert {name.rsplit(".", 1)[1] for name in policy.parameters} == {"A", "B"}
    addresses = {value.data_ptr() for value in base.parameters.values()}
    for model in (policy, policy.frozen_copy(), adapted(Lora(rank=2), [0])):
        for weights in model.weights([[0]]) + model.weights([list(range(model.cells))]):
            assert weights["layers.0.qkv"].data_ptr() == model.shared["layers.0.qkv"].data_ptr()
    for weights in (policy.weights([[0, 2]])[0], policy.frozen_copy().weights([[0, 1, 2]])[0]):
        assert {v.data_ptr() for n, v in weights.items() if n[-2:] not in (".A", ".B")} == addresses
        assert not any(v.requires_grad for n, v in weights.items() if n[-2:] not in (".A", ".B"))


def test_the_reference_stays_where_it_was() -> None:
    policy = decoder(1).with_lora(Lora(rank=2), [0, 1])
    start, base = policy.frozen_copy(), logits(policy)
    assert not start.parameters
    with torch.no_grad():
        for value in policy.parameters.values():
            value.add_(0.1)
    later, moved = policy.frozen_copy(), logits(policy)
    with torch.no_grad():
        for value in policy.parameters.values():
            value.add_(0.1)
    assert torch.equal(logits(start), base)
    assert torch.equal(logits(later), moved)
    assert not torch.equal(moved, base)
    assert not any(value.requires_grad for value in later.parameters.values())


def test_adapters_of_a_base_of_16_bits_are_float32() -> None:
    policy = adapted(Lora(rank=2), [0], dtype=torch.bfloat16)
    assert {value.dtype for value in policy.parameters.values()} == {torch.float32}
    assert policy.dtype == torch.bfloat16
    exact = adapted(Lora(rank=2), [0])
    assert (logits(exact) - logits(decoder(1))).abs().mean() > 0.3
    assert (logits(policy) - logits(exact)).abs().mean() < 0.03


def test_merging_prefixes_changes_nothing() -> None:
    policy = adapted(Lora(rank=4), [3], "qwen3", torch.float64)
    torch.testing.assert_close(logits(policy, plain=True), logits(policy), rtol=0, atol=1e-10)


def test_unknown_targets_are_named() -> None:
    with pytest.raises(UserError, match=r"policy\.lora\.targets.*'query'.*Valid: all-linear, q_proj"):
        decoder(1).with_lora(Lora(targets=("q_proj", "query")), [0])
    with pytest.raises(UserError, match="no such linear layer"):
        decoder(1).with_lora(Lora(targets=()), [0])
    with pytest.raises(ValueError, match="base of one cell"):
        decoder(2).with_lora(Lora(), [0])


def saved_bytes(policy: StackedPolicy, rollout: Rollout) -> tuple[Tensor, int]:
    """Scores, and the memory of what the forward pass keeps for the backward pass beside the weights."""
    own = {value.data_ptr() for value in (*policy.shared.values(), *policy.parameters.values())}
    saved: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        if value.data_ptr() not in own:
            saved[value.data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        score = token_scores(policy, [rollout])[0].logp
    return score, sum(saved.values())


def test_over_16_bits_adapters_keep_no_wide_copies_of_their_inputs() -> None:
    rollout = written(PROMPTS, [[5, 6, 7, 1], [5, 6, 1], [9], [9, 3, 4, 4, 1], [1], [7, 7]])
    _, adapters = saved_bytes(adapted(Lora(rank=1), [1], dtype=torch.bfloat16), rollout)
    _, whole = saved_bytes(decoder(1, dtype=torch.bfloat16), rollout)
    assert adapters < whole


@pytest.mark.parametrize("wide_inputs", [False, True])
def test_widened_products_have_the_gradients_of_plain_ones(wide_inputs: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 6, generator=draw).bfloat16().requires_grad_(wide_inputs)
    weights = [
        torch.randn(2, *shape, generator=draw).requires_grad_() for shape in ((6, 3), (3, 4), (6, 3), (3, 7), (6, 1))
    ]
    weights.append(torch.randn(2, 1, 2, generator=draw).requires_grad_())
    wide = x.detach().float().requires_grad_(wide_inputs)
    found, expected = low_rank_products(x, weights), low_rank_products(wide, weights)
    inputs = weights + ([x] if wide_inputs else [])
    losses = [sum((each.sin() * 2).sum() for each in products) for products in (found, expected)]
    mine = torch.autograd.grad(losses[0], inputs)
    theirs = torch.autograd.grad(losses[1], weights + ([wide] if wide_inputs else []))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for got, right in zip(mine, theirs, strict=True):
        assert torch.equal(got, right.to(got.dtype))


@pytest.mark.parametrize("adapters", [False, True])
def test_gradient_checkpointing_keeps_layer_inputs_only(adapters: bool) -> None:
    rollout = written(PROMPTS, [[5, 6, 7, 1], [5, 6, 1], [9], [9, 3, 4, 4, 1], [1], [7, 7]])
    found = []
    for checkpointing in (False, True):
        policy = adapted(Lora(rank=4), [1]) if adapters else decoder(1, "qwen3", num_key_value_heads=2)
        policy.gradient_checkpointing = checkpointing
        score, inside = saved_bytes(policy, rollout)
        (torch.linspace(-1, 2, score.numel()).view(score.shape) * score).sum().backward()
        found.append((inside, score, [value.grad for value in policy.parameters.values()]))
    (full, score, gradients), (little, again, same) = found
    assert torch.equal(score, again)
    assert all(torch.equal(mine, other) for mine, other in zip(gradients, same, strict=True))
    assert little < 0.5 * full


def test_the_configuration_says_which_base(tmp_path: Path) -> None:
    decoder(1).save(tmp_path, 0)
    assert StackedPolicy.from_pretrained(tmp_path).with_lora(Lora(rank=2), [0]).origin == str(tmp_path)
    assert configuration()._name_or_path == ""


@pytest.mark.parametrize("engine", ["stacked", "transformers"])
def test_adapters_of_a_model_on_the_hub_name_it_and_its_revision(engine: str, tmp_path: Path) -> None:
    from peft import PeftConfig

    decoder(1).save(tmp_path / "snapshot", 0)
    section = HfPolicy(model="someone/something", revision="v2", engine=engine, lora=Lora(rank=2))
    load_policy(section, tmp_path / "snapshot", 1, "cpu").save(tmp_path / "cell", 0)
    config = PeftConfig.from_pretrained(tmp_path / "cell")
    assert (config.base_model_name_or_path, config.revision) == ("someone/something", "v2")
