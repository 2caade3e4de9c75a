"""The configuration of a tiny policy is the one that transformers would write and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen2Config, Qwen3Config

from klab.grid.schema.sections import TinyPolicy
from klab.harness.policy.init.initial_policy import tiny_config
from klab.harness.policy.pretrained import checkpoint_config
from klab.harness.policy.stacked.architecture import Architecture
from klab.harness.policy.stated_config import StatedConfig

FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def of_family(family: str, kv_heads: int | None = None) -> StatedConfig:
    section = TinyPolicy(family=family, hidden=32, heads=4, kv_heads=kv_heads, layers=3, intermediate=48)
    config = tiny_config(section, 15, end=1, pad=0, context=256)
    config.dtype, config.architectures = torch.float64, ["SomeModel"]
    return config


def of_transformers(family: str, kv_heads: int | None = None) -> Any:
    config = FAMILIES[family](
        vocab_size=15,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads or 4,
        max_position_embeddings=256,
        initializer_range=32**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **({"head_dim": 8} if family == "qwen3" else {}),
    )
    config.dtype, config.architectures = torch.float64, ["SomeModel"]
    return config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_the_file_is_that_of_transformers(tmp_path: Path, family: str, kv_heads: int | None) -> None:
    of_family(family, kv_heads).save_pretrained(tmp_path / "mine")
    of_transformers(family, kv_heads).save_pretrained(tmp_path / "theirs")
    mine, theirs = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("mine", "theirs"))
    assert mine == theirs
    assert type(AutoConfig.from_pretrained(tmp_path / "mine")) is FAMILIES[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_read_as_transformers_reads_it(tmp_path: Path, family: str) -> None:
    of_transformers(family, 2).save_pretrained(tmp_path)
    found = checkpoint_config(tmp_path)
    assert isinstance(found, StatedConfig)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert Architecture.from_config(found) == Architecture.from_config(theirs)
    assert found.name_or_path == theirs.name_or_path == str(tmp_path)
    assert found.architectures == theirs.architectures
    for name in ("rope_parameters", "max_position_embeddings", "eos_token_id", "pad_token_id", "bos_token_id"):
        assert getattr(found.get_text_config(), name) == getattr(theirs, name), name
    with pytest.raises(AttributeError, match="sliding"):
        _ = found.sliding


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"head_dim": 16},
        {"model_type": "mistral"},
        {"auto_map": {"AutoConfig": "code.Config"}},
        {"rope_parameters": None, "rope_theta": 5000.0},
    ],
)
def test_another_configuration_is_read_by_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    of_family("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    record = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in record.items() if value is not None}))
    assert StatedConfig.read(tmp_path) is None


def test_a_setting_that_is_missing_is_left_to_transformers(tmp_path: Path) -> None:
    of_family("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    record = json.loads(file.read_text())
    del record["head_dim"]
    file.write_text(json.dumps(record))
    assert isinstance(checkpoint_config(tmp_path), LlamaConfig)
    file.write_text("[]")
    assert StatedConfig.read(tmp_path) is None
