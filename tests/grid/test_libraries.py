"""A cell says by its settings which optional libraries its numbers depend on."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from klab.grid import parse_grid
from klab.grid.libraries import LIBRARIES, libraries

ROOT = Path(__file__).parents[2]
HF = {"name": "hf", "model": "org/model"}
LORA = {**HF, "lora": {"rank": 8}}
VLLM = {"sampler": {"engine": "vllm"}}
MATH = ("math-verify", "sympy")


def used(training: dict[str, Any] | None = None, policy: Any = "tiny", task: Any = "addition", **more: Any) -> Any:
    grid = {"name": "study", "task": task, "policy": policy, "training": training or {}}
    return libraries(parse_grid(json.dumps(grid), "study.yaml").cells[0].resolved(), **more)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ()),
        ({"policy": {"name": "tiny", "lora": {"rank": 8}}}, ()),
        ({"policy": HF}, ()),
        ({"policy": LORA}, ("peft",)),
        ({"policy": {**LORA, "engine": "stacked"}}, ()),
        ({"training": VLLM, "policy": HF}, ("vllm",)),
        ({"training": {"sampler": {"engine": "vllm", "url": "http://host:8000"}}, "policy": HF}, ("trl",)),
        ({"task": "gsm8k", "policy": HF}, MATH),
        ({"task": {"name": "gsm8k", "reward": "exact"}, "policy": HF}, ()),
        ({"task": {"name": "reasoning_gym", "dataset": "gcd"}}, ("reasoning-gym",)),
        ({"task": {"name": "verifiers", "environment": "my-sums"}}, ("verifiers",)),
    ],
)
def test_libraries_of_klabs_engine(settings: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert used(**settings) == expected


def test_adapters_of_a_tiny_policy_on_trl_are_pefts() -> None:
    assert used({"engine": "trl"}) == ("trl", "accelerate")
    assert used({"engine": "trl"}, {"name": "tiny", "lora": {"rank": 8}}) == ("trl", "accelerate", "peft")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"optim": "sgd"}, ()),
        ({"optim": "adamw_8bit"}, ("bitsandbytes",)),
        ({"optim": "paged_adamw_32bit"}, ("bitsandbytes",)),
        ({"deepspeed": "zero3.json"}, ("deepspeed",)),
        ({"use_liger_kernel": True}, ("liger-kernel",)),
        ({"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}, ("flash-attn",)),
        ({"model_init_kwargs": {"attn_implementation": "sdpa"}}, ()),
        ({"model_init_kwargs": {"load_in_4bit": True}}, ("bitsandbytes",)),
        ({"model_init_kwargs": {"quantization_config": {"load_in_8bit": True}}}, ("bitsandbytes",)),
        ({"model_init_kwargs": {"quantization_config": {"quant_method": "gptq"}}}, ()),
    ],
)
def test_libraries_that_fields_of_trl_bring(fields: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert used({"engine": "trl", "trl": fields}, HF) == ("trl", "accelerate", *expected)


def test_deepspeed_is_used_where_the_launcher_says_so() -> None:
    assert "deepspeed" in used({"engine": "trl"}, launcher="DEEPSPEED")
    assert "deepspeed" not in used({"engine": "trl"}, launcher="FSDP")
    assert used({}, launcher="DEEPSPEED") == ()


def test_every_extra_that_numbers_depend_on_is_known() -> None:
    """Trackers and servers compute nothing, nor does a client of HTTP; verl trains outside of klab.
    lm_eval evaluates what is trained, and its version stands in its own record."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {
        re.split(r"[\[<>=]", each)[0]
        for extra, needs in extras.items()
        if extra not in ("dev", "track", "serve", "verl", "lm_eval")
        for each in needs
    }
    assert names - {"requests"} <= LIBRARIES.keys()
