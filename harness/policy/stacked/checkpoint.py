"""Reading and writing ordinary Hugging Face checkpoint folders as the stacked decoder's parameters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from klab.grid.errors import UserError
from klab.harness.policy.stacked.config import Architecture

_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes without rules of their own."""


def read_config(folder: str | Path, trusted: bool = False) -> Any:
    """The transformers configuration of a folder or hub id; `trusted`: its own Python code may run.

    Raises:
        UserError: there is none, or it needs code that is not trusted.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trusted)
    except (OSError, ValueError) as error:
        if not trusted and "custom code" in str(error):
            raise UserError(
                "the model brings Python code of its own, which is run only where you say so",
                file=folder,
                key="policy.trust_remote_code",
                value=False,
            ) from error
        raise UserError(f"no readable model configuration: {_first_line(error)}", file=folder) from error


def read_tokenizer(folder: str | Path, trusted: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub id; `trusted`: as in `read_config`. Raises UserError where there is none.

    One that says of itself that it is all in its `tokenizer.json` is taken at its word: `AutoTokenizer` would give a
    Qwen2 model Qwen2's own way to split text.
    """
    from transformers import AutoTokenizer

    loader: Any = PreTrainedTokenizerFast if _tokenizer_class(Path(folder)) in _GENERIC else AutoTokenizer
    try:
        return cast(PreTrainedTokenizerFast, loader.from_pretrained(str(folder), trust_remote_code=trusted))
    except (OSError, ValueError) as error:
        raise UserError(f"no readable tokenizer: {_first_line(error)}", file=folder) from error


def _tokenizer_class(folder: Path) -> str | None:
    try:
        found: str | None = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return None
    return found


def read_weights(folder: str | Path, architecture: Architecture) -> dict[str, Tensor]:
    """One cell's parameters under the stacked decoder's names.

    Raises:
        UserError: a missing file or tensor, or a tensor of another shape than the configuration says.
    """
    state = _state(folder)
    found = {}
    for name, shape in architecture.shapes().items():
        parts = []
        for source in _sources(name):
            if source not in state:
                raise UserError(f"the checkpoint has no tensor {source!r}", file=folder)
            part = state[source]
            parts.append(part.t() if len(shape) == 2 and name != "embedding" else part)
        value = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        if tuple(value.shape) != shape:
            raise UserError(f"{name} has shape {tuple(value.shape)}, the configuration says {shape}", file=folder)
        found[name] = value
    return found


def write_checkpoint(
    folder: Path,
    config: Any,
    tokenizer: PreTrainedTokenizerFast,
    architecture: Architecture,
    weights: dict[str, Tensor],
) -> None:
    """Write one cell so that `AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer` load it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, value in weights.items():
        sources = _sources(name)
        sizes = _sizes(name, architecture) if len(sources) > 1 else [value.shape[-1]]
        for source, part in zip(sources, torch.split(value, sizes, -1), strict=True):
            transposed = part.t() if value.dim() == 2 and name != "embedding" else part
            state[source] = transposed.contiguous()
    config = copy.deepcopy(config)
    config.dtype = weights["embedding"].dtype
    config.architectures = [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[architecture.family] + "ForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _sources(name: str) -> list[str]:
    """Names of the tensors of a transformers checkpoint that make up a parameter, in order along its last axis."""
    if name == "embedding":
        return ["model.embed_tokens.weight"]
    if name == "norm":
        return ["model.norm.weight"]
    if name == "head":
        return ["lm_head.weight"]
    _, layer, kind = name.split(".")
    at = f"model.layers.{layer}."
    kind, ending = (kind[: -len("_bias")], ".bias") if kind.endswith("_bias") else (kind, ".weight")
    inside = {
        "input_norm": ["input_layernorm"],
        "mlp_norm": ["post_attention_layernorm"],
        "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "q_norm": ["self_attn.q_norm"],
        "k_norm": ["self_attn.k_norm"],
        "out": ["self_attn.o_proj"],
        "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    return [at + part + ending for part in inside[kind]]


def _sizes(name: str, architecture: Architecture) -> list[int]:
    if "qkv" in name:
        narrow = architecture.num_kv_heads * architecture.head_dim
        return [architecture.num_heads * architecture.head_dim, narrow, narrow]
    return [architecture.intermediate_size] * 2


def _state(folder: str | Path) -> dict[str, Tensor]:
    path = Path(folder)
    files = [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
    if all(file.exists() for file in files):
        from safetensors.torch import load_file

        state: dict[str, Tensor] = {}
        for file in files:
            state.update(load_file(file))
        return state
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"no readable weights: {_first_line(error)}", file=folder) from error
    return dict(model.state_dict())


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
