"""Low-rank adapters (LoRA, Hu et al. 2021) of a transformers model through the library PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klab.grid.errors import UserError
from klab.harness.policy.hf.functional_model import FunctionalModel
from klab.harness.policy.pretrained import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_LORA_A, _LORA_B = "lora_A.default.", "lora_B.default."


def attach(model: Any, section: Any) -> Any:
    """A model with adapters on the linear layers that the grid's `policy.lora` names; everything else frozen.

    Raises:
        UserError: PEFT is not installed, or there is no such layer.
    """
    config = lora_config(section)
    from peft import get_peft_model

    linear = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_linear(module)})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT handles a layer that stores its matrix transposed, and warns
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"PEFT cannot adapt them: {error}",
            key="policy.lora.targets",
            value=section.targets,
            hint=f"Linear layers: {', '.join(linear)}.",
        ) from error


def lora_config(section: Any) -> Any:
    """The `peft.LoraConfig` of the grid's `policy.lora`.

    Raises:
        UserError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError(
            "adapters of this architecture need the library PEFT, which is not installed",
            key="policy.lora",
            hint='pip install "klab[lora]".',
        ) from error
    targets = section.targets if section.targets == "all-linear" else list(section.targets)
    return LoraConfig(
        r=section.rank, lora_alpha=section.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def _is_linear(module: Any) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted model belongs to its adapters."""
    return _LORA_A in name or _LORA_B in name


def is_lora_b(name: str) -> bool:
    """Whether a parameter is the matrix B of an adapter, which is zero at first."""
    return _LORA_B in name


def initial_weights(adapters: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
    """New adapters, one cell per seed: A [C, rank, in] uniform in ±1/√in (kaiming_uniform with a = √5), B zero.

    Args:
        adapters: one cell's, for their names, shapes, precision and device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    found = {}
    for name, value in adapters.items():
        if is_lora_b(name):
            found[name] = value.new_zeros(len(seeds), *value.shape)
        else:
            drawn = [(2 * torch.rand(value.shape, generator=each) - 1) * value.shape[-1] ** -0.5 for each in generators]
            found[name] = torch.stack(drawn).to(value)
    return found


def name_in_base(name: str) -> str:
    """The name that a parameter of an adapted model has in the model without adapters."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def merged(model: FunctionalModel, name: str, value: Tensor, adapters: Mapping[str, Tensor]) -> Tensor:
    """A frozen weight with what adapters add to it; itself where they add nothing.

    Args:
        name: of the weight in the adapted model.
        adapters: of one cell, by name.
    """
    owner, of_layer, _ = name.rpartition(".base_layer.weight")
    if not of_layer:
        return value
    with model.swap_parameters({key: each for key, each in adapters.items() if key.startswith(f"{owner}.lora_")}):
        delta: Tensor = model.model.get_submodule(owner).get_delta_weight("default")
    return (value + delta).to(value.dtype)


def write_adapters(folder: Path, model: Any, base: str, revision: str | None, adapters: Mapping[str, Tensor]) -> None:
    """One cell's adapters as a folder that `peft.PeftModel.from_pretrained(base_model, folder)` loads."""
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base, revision
    config.save_pretrained(str(folder))
    state = {name.replace(".default.", "."): value.contiguous() for name, value in adapters.items()}
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def read_adapters(folder: str | Path) -> dict[str, Tensor]:
    """The inverse of `write_adapters`.

    Raises:
        UserError: no adapters there.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    if not (path / ADAPTER_CONFIG).exists() or not (path / ADAPTER_WEIGHTS).exists():
        raise UserError("no adapters: both files are needed", file=folder, allowed=(ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    state = load_file(path / ADAPTER_WEIGHTS)
    return {name.replace("lora_A.", _LORA_A).replace("lora_B.", _LORA_B): value for name, value in state.items()}
