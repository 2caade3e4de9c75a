"""Low-rank adapters (LoRA, Hu et al. 2021) of stacked cells over one frozen base model, saved as PEFT adapter folders.

Cell c computes x·W + (alpha/rank)·x·A[c]·B[c], with W stored once for all cells, A [C, in, rank] and B [C, rank, out].
A layer's concatenated matrices have an adapter per projection of the transformers model, as in PEFT. Over a base of 16
bits, adapters are float32 and their products are computed in float32 (PEFT's `autocast_adapter_dtype`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klab.grid.errors import UserError
from klab.harness.policy.pretrained import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from klab.harness.policy.stacked.architecture import Architecture
from klab.harness.policy.stacked.layers import linear

PROJECTIONS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "out": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The matrices of a layer, and the projections of the transformers model that are concatenated in each."""

TARGETS = tuple(part for parts in PROJECTIONS.values() for part in parts)


@dataclass(frozen=True, slots=True)
class Adapters:
    """Which adapters an architecture has.

    Attributes:
        rank, alpha: the products are multiplied by alpha/rank.
        targets: the projections that have one, the same in every layer.
        sizes: (in, out) of every projection.
        num_layers: of the architecture.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    sizes: dict[str, tuple[int, int]]
    num_layers: int

    @classmethod
    def from_section(cls, section: Any, architecture: Architecture) -> Adapters:
        """Read the grid's `policy.lora`.

        Raises:
            UserError: no targets, or one that the decoder's layers do not have.
        """
        chosen = TARGETS if section.targets == "all-linear" else tuple(section.targets)
        for name in chosen or ("",):
            if name not in TARGETS:
                allowed = ("all-linear", *TARGETS)
                raise UserError("no such linear layer", key="policy.lora.targets", value=name, allowed=allowed)
        in_order = tuple(name for name in TARGETS if name in chosen)
        sizes = architecture.projection_sizes()
        return cls(section.rank, section.alpha, in_order, sizes, architecture.num_layers)

    def initial_weights(self, seeds: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """New adapters, one cell per seed, on the CPU: A [C, in, rank] uniform in ±1/√in (PEFT's kaiming_uniform with
        a = √5), B [C, rank, out] zero."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        found = {}
        for layer in range(self.num_layers):
            for part in self.targets:
                inputs, outputs = self.sizes[part]
                drawn = [(2 * torch.rand(inputs, self.rank, generator=each) - 1) * inputs**-0.5 for each in generators]
                found[f"layers.{layer}.{part}.A"] = torch.stack(drawn).to(dtype)
                found[f"layers.{layer}.{part}.B"] = torch.zeros(len(seeds), self.rank, outputs, dtype=dtype)
        return found

    def add_to(self, out: Tensor, x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
        """The output `out` [A, M, out] of matrix `name` for inputs x [A, M, in], plus what its adapters compute."""
        at, kind = name.rsplit(".", 1)
        parts = PROJECTIONS[kind]
        if not any(part in self.targets for part in parts):
            return out
        names = [f"{at}.{part}" for part in parts]
        given = [weights[name + end] for name in names if name + ".A" in weights for end in (".A", ".B")]
        if not given:
            return out
        products = iter(low_rank_products(x, given))
        pieces = torch.split(out, [self.sizes[part][1] for part in parts], -1)
        adapted = [
            torch.add(piece, next(products), alpha=self.scaling).to(piece.dtype) if name + ".A" in weights else piece
            for name, piece in zip(names, pieces, strict=True)
        ]
        return torch.cat(adapted, -1) if len(adapted) > 1 else adapted[0]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @torch.no_grad()
    def merge(self, base: Mapping[str, Tensor], adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One cell's weights with its adapters merged into them: W + (alpha/rank)·A·B."""
        return {name: self.merge_into(name, value, adapters) for name, value in base.items()}

    @torch.no_grad()
    def merge_into(self, name: str, value: Tensor, adapters: Mapping[str, Tensor]) -> Tensor:
        """One weight of the base model with what one cell's adapters add to it; itself where they add nothing."""
        at, _, kind = name.rpartition(".")
        parts = PROJECTIONS.get(kind, ())
        if not any(part in self.targets for part in parts):
            return value
        return (value + torch.cat([self._delta(adapters, f"{at}.{part}", value) for part in parts], -1)).to(value.dtype)

    def _delta(self, adapters: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
        down, up = adapters.get(name + ".A"), adapters.get(name + ".B")
        if down is None or up is None:
            return like.new_zeros(self.sizes[name.rsplit(".", 1)[1]])
        return (down @ up) * self.scaling


def low_rank_products(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """x·A·B [A, M, out] for each pair A, B of `weights`, in their precision; x [A, M, in] may be narrower."""
    if x.dtype == weights[0].dtype:
        return [linear(linear(x, down, None), up, None) for down, up in zip(weights[::2], weights[1::2], strict=True)]
    products: tuple[Tensor, ...] = _WidenedProducts.apply(x, *weights)  # type: ignore[no-untyped-call]
    return products


class _WidenedProducts(torch.autograd.Function):
    """`low_rank_products` of a 16-bit x, which alone is kept for the backward pass: there it is widened once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(low_rank_products(x.to(weights[0].dtype), weights))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        with torch.enable_grad():
            wide = x.to(weights[0].dtype).requires_grad_(needed[0])
            leaves = [w.detach().requires_grad_(wanted) for w, wanted in zip(weights, needed[1:], strict=True)]
            products = low_rank_products(wide, leaves)
        wanted = [leaf for leaf in (wide, *leaves) if leaf.requires_grad]
        found = iter(torch.autograd.grad(products, wanted, grads))
        d_x = next(found).to(x.dtype) if needed[0] else None
        return d_x, *(next(found) if each else None for each in needed[1:])


def write_adapters(
    folder: Path, settings: Adapters, base: str, revision: str | None, adapters: Mapping[str, Tensor]
) -> None:
    """One cell's adapters as a folder that `peft.PeftModel.from_pretrained(base_model, folder)` loads.

    Args:
        base, revision: folder or hub id of the model they belong to.
        adapters: A [in, rank] and B [rank, out] of every target.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": list(settings.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(described, indent=1))
    state = {_peft_name(name): value.t().contiguous() for name, value in adapters.items()}
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def read_adapters(folder: str | Path, settings: Adapters) -> dict[str, Tensor]:
    """The inverse of `write_adapters`.

    Raises:
        UserError: no adapters there, or others than the settings say.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    if not (path / ADAPTER_CONFIG).exists() or not (path / ADAPTER_WEIGHTS).exists():
        raise UserError("no adapters: both files are needed", file=folder, allowed=(ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    described = json.loads((path / ADAPTER_CONFIG).read_text())
    mine = (settings.rank, settings.alpha, sorted(settings.targets))
    theirs = (described.get("r"), described.get("lora_alpha"), sorted(described.get("target_modules") or ()))
    if mine != theirs:
        raise UserError(f"adapters (rank, alpha, targets) {theirs}, the policy has {mine}", file=folder)
    state, found = load_file(path / ADAPTER_WEIGHTS), {}
    for layer in range(settings.num_layers):
        for part in settings.targets:
            inputs, outputs = settings.sizes[part]
            for end, shape in (("A", (inputs, settings.rank)), ("B", (settings.rank, outputs))):
                name = f"layers.{layer}.{part}.{end}"
                value = state.get(_peft_name(name))
                if value is None or tuple(value.t().shape) != shape:
                    raise UserError(f"no tensor {_peft_name(name)!r} of the shape that the policy has", file=folder)
                found[name] = value.t()
    return found


def _peft_name(name: str) -> str:
    """The name of an adapter's tensor in a PEFT checkpoint."""
    _, layer, part, end = name.split(".")
    block = "mlp" if part in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"base_model.model.model.layers.{layer}.{block}.{part}.lora_{end}.weight"
