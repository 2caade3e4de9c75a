"""Low-rank adapters of a transformers model through the library PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klab.grid.errors import UserError
from klab.harness.policy.stacked.lora import CONFIG, WEIGHTS

_FIRST, _SECOND = "lora_A.default.", "lora_B.default."


def attach(model: Any, section: Any) -> Any:
    """A model with adapters on the linear layers that the grid's `policy.lora` names; everything else frozen.

    Raises:
        UserError: PEFT is not installed, or there is no such layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(
            "adapters of this architecture need the library PEFT, which is not installed",
            key="policy.lora",
            hint='pip install "klab[lora]".',
        ) from error
    targets = section.targets if section.targets == "all-linear" else list(section.targets)
    config = LoraConfig(
        r=section.rank, lora_alpha=section.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    linear = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_linear(module)})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a layer that stores its matrix transposed is noticed by PEFT itself
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"PEFT cannot adapt them: {error}",
            key="policy.lora.targets",
            value=targets,
            hint=f"Linear layers: {', '.join(linear)}.",
        ) from error


def _is_linear(module: Any) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def is_part(name: str) -> bool:
    """Whether a parameter of an adapted model belongs to its adapters."""
    return _FIRST in name or _SECOND in name


def is_second(name: str) -> bool:
    """Whether a parameter is the matrix B of an adapter, which is zero at first."""
    return _SECOND in name


def initial(adapters: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
    """New adapters, one cell per seed: A [C, rank, in] uniform in ±1/√in (kaiming_uniform with a = √5), B zero.

    Args:
        adapters: one cell's, for their names, shapes, precision and device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    found = {}
    for name, value in adapters.items():
        if is_second(name):
            found[name] = value.new_zeros(len(seeds), *value.shape)
        else:
            drawn = [(2 * torch.rand(value.shape, generator=each) - 1) * value.shape[-1] ** -0.5 for each in generators]
            found[name] = torch.stack(drawn).to(value)
    return found


def write(folder: Path, model: Any, base: str, revision: str | None, adapters: Mapping[str, Tensor]) -> None:
    """One cell's adapters as a folder that `peft.PeftModel.from_pretrained(base_model, folder)` loads."""
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base, revision
    config.save_pretrained(str(folder))
    state = {name.replace(".default.", "."): value.contiguous() for name, value in adapters.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def read(folder: str | Path) -> dict[str, Tensor]:
    """The inverse of `write`.

    Raises:
        UserError: no adapters there.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    if not (path / CONFIG).exists() or not (path / WEIGHTS).exists():
        raise UserError("no adapters: neither file may be missing", file=folder, allowed=(CONFIG, WEIGHTS))
    state = load_file(path / WEIGHTS)
    return {name.replace("lora_A.", _FIRST).replace("lora_B.", _SECOND): value for name, value in state.items()}
