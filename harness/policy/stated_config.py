"""The model configuration of a tiny policy: `config.json` as transformers writes it, with every setting stated, so that
it is read and written without transformers, whose configuration classes take seconds to import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = "config.json"

_ALIKE: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "use_cache": True,
}
_WINDOWS: dict[str, Any] = {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {**_ALIKE, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    "qwen2": {**_ALIKE, **_WINDOWS},
    "qwen3": {**_ALIKE, **_WINDOWS, "attention_bias": False},
}
"""By family, the settings that all tiny policies have."""

_SIZES = {
    "eos_token_id",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "vocab_size",
}
"""The settings in which tiny policies differ."""

_DERIVED = {"llama": {"head_dim"}, "qwen2": {"layer_types"}, "qwen3": {"head_dim", "layer_types"}}
"""By family, settings that follow from the others."""

_OF_FILE = {"architectures", "dtype", "transformers_version"}
"""What `config.json` says besides the settings of the model."""


class StatedConfig:
    """A model configuration whose settings are its attributes, under the names that transformers has for them.

    Attributes:
        name_or_path: the folder that it was read from.
        dtype: of the weights, torch's; None: not known yet.
        architectures: names of transformers' model classes.
    """

    name_or_path = ""
    dtype: Any = None
    architectures: list[str] | None = None

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("_settings", {})
        if name not in settings:
            raise AttributeError(name)
        return settings[name]

    @classmethod
    def of_family(cls, family: str, **sizes: Any) -> StatedConfig:
        """A new configuration.

        Args:
            family: `llama`, `qwen2` or `qwen3`.
            sizes: the settings that are not the same in all tiny policies.
        """
        derived = {
            "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"],
            "layer_types": ["full_attention"] * sizes["num_hidden_layers"],
        }
        own = {name: derived[name] for name in _DERIVED[family]}
        return cls({**_OF_FAMILY[family], **own, **sizes, "model_type": family})

    @classmethod
    def read(cls, folder: str | Path) -> StatedConfig | None:
        """The configuration of a folder that `save_pretrained` wrote; None where its settings are not those of a tiny
        policy."""
        try:
            found = json.loads((Path(folder) / FILE).read_text())
        except (OSError, ValueError):
            return None
        family = found.get("model_type") if isinstance(found, dict) else None
        if family not in _OF_FAMILY:
            return None
        settings = {name: value for name, value in found.items() if name not in _OF_FILE}
        alike = _OF_FAMILY[family]
        if settings.keys() != alike.keys() | _SIZES | _DERIVED[family] or any(settings[n] != alike[n] for n in alike):
            return None
        config = cls.of_family(family, **{name: settings[name] for name in _SIZES - {"model_type"}})
        if config._settings != settings:
            return None
        config.name_or_path, config.architectures = str(folder), found.get("architectures")
        return config

    def get_text_config(self) -> StatedConfig:
        """Itself: there is nothing but text."""
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        record = {**self._settings, "transformers_version": version("transformers")}
        if self.architectures is not None:
            record["architectures"] = self.architectures
        if self.dtype is not None:
            record["dtype"] = str(self.dtype).removeprefix("torch.")
        (path / FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
