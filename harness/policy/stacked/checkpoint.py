"""Weights of ordinary Hugging Face checkpoint folders, read and written as one cell's parameters."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klab.grid.errors import UserError
from klab.harness.policy.pretrained import first_line
from klab.harness.policy.stacked.architecture import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def read_weights(folder: str | Path, architecture: Architecture) -> dict[str, Tensor]:
    """One cell's parameters under the names of `Architecture.parameter_shapes`.

    Raises:
        UserError: a missing file or tensor, or a tensor of another shape than the configuration says.
    """
    state = _read_state_dict(folder)
    found = {}
    for name, shape in architecture.parameter_shapes().items():
        parts = []
        for source in _hf_names(name):
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
    state = {source: value.contiguous() for source, value in named_tensors(weights, architecture)}
    config = copy.deepcopy(config)
    config.dtype = weights["embedding"].dtype
    config.architectures = [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[architecture.family] + "ForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def named_tensors(weights: Mapping[str, Tensor], architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """One cell's parameters as the tensors of a transformers checkpoint, views under their names there."""
    for name, value in weights.items():
        sources = _hf_names(name)
        sizes = _split_sizes(name, architecture) if len(sources) > 1 else [value.shape[-1]]
        for source, part in zip(sources, torch.split(value, sizes, -1), strict=True):
            yield source, part.t() if value.dim() == 2 and name != "embedding" else part


def _hf_names(name: str) -> list[str]:
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


def _split_sizes(name: str, architecture: Architecture) -> list[int]:
    if "qkv" in name:
        narrow = architecture.num_kv_heads * architecture.head_dim
        return [architecture.num_heads * architecture.head_dim, narrow, narrow]
    return [architecture.intermediate_size] * 2


def _read_state_dict(folder: str | Path) -> dict[str, Tensor]:
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
        raise UserError(f"no readable weights: {first_line(error)}", file=folder) from error
    return dict(model.state_dict())
