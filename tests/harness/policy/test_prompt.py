"""From prompts to token ids: chat templates, special tokens, end tokens, and what a tokenizer may get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from klab.grid import UserError
from klab.harness.policy.load import load_policy
from klab.harness.policy.pretrained import check_ids, read_tokenizer
from klab.harness.policy.prompt import PromptEncoder, prompt_ids
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.sampling.trajectory_builder import TrajectoryBuilder
from klab.harness.policy.special_tokens import eos_token_ids
from tests.support.random_checkpoints import checkpoint
from tests.support.tiny_policy import generators
from tests.support.transformers_tokenizer import character_tokenizer

LETTERS = "abcdefgh<>[] .:"
FAMILIES = ("Qwen2", "GPT2")


def opening(ending: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer that opens every text with `[`, and ends it with `ending`."""
    tokenizer = character_tokenizer(LETTERS)
    pairs = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[", "<end>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"[ $A {ending}".strip(), special_tokens=pairs
    )
    return tokenizer


def section(model: Path, **settings: Any) -> SimpleNamespace:
    """A policy section as the grid has it."""
    plain: dict[str, Any] = {"lora": None, "gradient_checkpointing": False, "dtype": "float32", "engine": "auto"}
    return SimpleNamespace(name="hf", model=str(model), **{**plain, "trust_remote_code": False, **settings})


@pytest.mark.parametrize("ending", ["", "<end>"])
def test_a_text_is_opened_and_not_ended(ending: str) -> None:
    tokenizer = opening(ending)
    assert tokenizer.decode(prompt_ids(tokenizer, "abc")) == "[abc"
    assert tokenizer.decode(prompt_ids(tokenizer, "ab", "never")) == "[ab"
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "[abc" + ending


def test_a_template_brings_its_special_tokens_itself() -> None:
    tokenizer = opening()
    tokenizer.chat_template = "[{{ messages[0].content }}{% if add_generation_prompt %}: {% endif %}"
    for chat in ("auto", "always"):
        assert tokenizer.decode(prompt_ids(tokenizer, "abc", chat)) == "[abc: "
    assert tokenizer.decode(prompt_ids(tokenizer, "abc", "never")) == "[abc"


def test_a_template_that_fails_or_is_missing() -> None:
    tokenizer = character_tokenizer(LETTERS)
    with pytest.raises(UserError, match=r"policy\.chat_template: the tokenizer has no chat template.*auto, never"):
        prompt_ids(tokenizer, "abc", "always")
    tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    with pytest.raises(
        UserError, match=r"the chat template of the tokenizer failed: TemplateError: no user here.*never"
    ):
        prompt_ids(tokenizer, "abc")
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(UserError, match="TemplateSyntaxError"):
        prompt_ids(tokenizer, "abcd")


def test_eos_token_ids() -> None:
    tokenizer = character_tokenizer(LETTERS)
    assert eos_token_ids(tokenizer, None, 18) == {1}
    assert eos_token_ids(tokenizer, {"eos_token_id": 5}, 18) == {1, 5}
    assert eos_token_ids(tokenizer, {"eos_token_id": [5, 7, 99]}, 18) == {1, 5, 7}
    tokenizer.eos_token = None
    assert eos_token_ids(tokenizer, {"eos_token_id": [5]}, 18) == {5}
    with pytest.raises(
        UserError, match=r"the tokenizer has no end-of-sequence token.*eos_token_id in generation_config\.json"
    ):
        eos_token_ids(tokenizer, {"eos_token_id": None}, 18)


IM_END = "{% for m in messages %}[{{ m.role }}:{{ m.content }}<|im_end|>\n{% endfor %}["


def turned(template: str, *special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with further special tokens and a chat template."""
    tokenizer = character_tokenizer(LETTERS + "0123456789")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def test_the_token_that_closes_the_assistants_turn_ends_it() -> None:
    tokenizer = turned(IM_END, "<|im_end|>", "<|im_end|>more")
    (closing,) = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    assert eos_token_ids(tokenizer, None, 64) == {tokenizer.eos_token_id, closing}
    assert eos_token_ids(tokenizer, None, closing) == {tokenizer.eos_token_id}  # a token that the model cannot write


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.content }}]{% endfor %}",
        "{{ messages[0].content }}",
        "{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}",
        "{% for m in messages %}<|im_end|>{{ m.content }} .{% endfor %}",
    ],
)
def test_a_template_that_closes_with_text_adds_no_end_token(template: str) -> None:
    assert eos_token_ids(turned(template, "<|im_end|>"), None, 64) == {1}


def test_special_tokens_at_the_end_are_no_part_of_the_answer(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(LETTERS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    policy = load_policy(section(checkpoint(tmp_path, "GPT2", tokenizer)), tmp_path, 1, "cpu")
    builder = TrajectoryBuilder(policy, 0, [[4]], SamplingOptions(1, 8), None)
    written = ["a", "<|im_end|>", "b", "<unk>", "<pad>", "<|im_end|>"]
    builder.add_turn(0, list(tokenizer.convert_tokens_to_ids(written)), [0.0] * len(written))
    assert builder.build().texts == ["a<|im_end|>b<unk>"]


def test_templates_that_print_the_date_print_that_of_the_run() -> None:
    tokenizer = turned("{{ strftime_now('%d') }}[{{ messages[0].content }}")
    first = prompt_ids(tokenizer, "abc", "auto", 0.0)
    assert first == prompt_ids(tokenizer, "abc", "auto", 86_399.0)
    assert first != prompt_ids(tokenizer, "abc", "auto", 86_400.0)
    latest = "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}"
    assert prompt_ids(turned(latest), "x", "auto", 0.0) == prompt_ids(turned("01"), "x", "auto")


def test_an_encoder_keeps_what_it_encoded_and_knows_the_models_vocabulary() -> None:
    tokenizer = turned("{{ strftime_now('%d') }}[{{ messages[0].content }}")
    encode = PromptEncoder(tokenizer, len(tokenizer))
    assert encode("abc", "never") == prompt_ids(tokenizer, "abc", "never")
    assert encode("abc", "auto", 0.0) == prompt_ids(tokenizer, "abc", "auto", 0.0) != encode("abc", "auto", 86_400.0)
    assert encode("abc", "auto", 0.0) is encode("abc", "auto", 0.0)
    with pytest.raises(UserError, match="does not belong to the model"):
        PromptEncoder(tokenizer, 5)("abc", "never")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_without_an_end_token(tmp_path: Path, family: str) -> None:
    tokenizer = character_tokenizer(LETTERS)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no end-of-sequence token"):
        load_policy(section(checkpoint(tmp_path, family, tokenizer)), tmp_path, 1, "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_without_a_padding_token_is_as_good(tmp_path: Path, family: str) -> None:
    found = []
    for name in ("with", "without"):
        tokenizer = character_tokenizer(LETTERS)
        tokenizer.pad_token = "<pad>" if name == "with" else None
        folder = checkpoint(tmp_path / name, family, tokenizer, pad_token_id=None)
        policy = load_policy(section(folder), folder, 1, "cpu")
        assert (policy.tokenizer.pad_token_id is None) == (name == "without")
        prompts = [[[4, 5, 6, 7], [8]]]
        found.append(sample(policy, prompts, generators([0]), SamplingOptions(group_size=2, max_new_tokens=5))[0])
    assert found[0].tokens.tolist() == found[1].tokens.tolist()
    assert found[0].logp.tolist() == found[1].logp.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_of_another_model(tmp_path: Path, family: str) -> None:
    folder = checkpoint(tmp_path, family, LETTERS, vocab_size=10)
    with pytest.raises(UserError, match=r"does not belong to the model: it has 18 tokens, .* embedding has 10"):
        load_policy(section(folder), folder, 1, "cpu")


def test_a_special_token_without_a_row_in_the_embedding() -> None:
    tokenizer = character_tokenizer(LETTERS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    ids = prompt_ids(tokenizer, "ab<turn>")
    check_ids(ids, tokenizer, 19)
    with pytest.raises(UserError, match=r"it gives token 18 \('<turn>'\), the model's embedding has 18"):
        check_ids(ids, tokenizer, 18)


def test_a_tokenizer_is_what_its_file_says(tmp_path: Path) -> None:
    """transformers would take Qwen2's own rules for the tokenizer of any Qwen2 model."""
    folder = checkpoint(tmp_path, "Qwen2", LETTERS)
    assert read_tokenizer(folder).decode(prompt_ids(read_tokenizer(folder), "ab cd")) == "ab cd"


def test_code_of_the_checkpoint_runs_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = checkpoint(tmp_path / "own_model", "GPT2", LETTERS)
    (folder / "configuration_own.py").write_text(
        "from transformers import GPT2Config\nclass OwnConfig(GPT2Config):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import GPT2LMHeadModel\nfrom .configuration_own import OwnConfig\n"
        "class OwnModel(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"policy\.trust_remote_code: the model brings Python code of its own"):
        load_policy(section(folder), folder, 1, "cpu")
    policy = load_policy(section(folder, trust_remote_code=True), folder, 1, "cpu")
    prompts = [[[4, 5, 6, 7], [8]]]
    drawn = sample(policy, prompts, generators([0]), SamplingOptions(group_size=2, max_new_tokens=5))[0]
    plain = sample(policy, prompts, generators([0]), SamplingOptions(group_size=2, max_new_tokens=5), plain=True)[0]
    assert drawn.tokens.tolist() == plain.tokens.tolist()


def test_the_stacked_decoder_cannot_be_forced_on_another_architecture(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "GPT2", LETTERS)
    with pytest.raises(UserError, match="not in the stacked engine"):
        load_policy(section(folder, engine="stacked"), folder, 1, "cpu")
