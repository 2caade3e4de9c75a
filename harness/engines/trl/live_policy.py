"""The model that TRL trains, as a klab policy to sample from and to score with; its weights stay where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from klab.harness.policy.hf.functional_model import FunctionalModel
from klab.harness.policy.hf.policy import TransformersPolicy


class LivePolicy(TransformersPolicy):
    """One model whose parameters are its own, with or without its adapters. It is never trained through this view.

    Args:
        model: as TRL trains it, without the wrapper of its processes.
        generation_config: the checkpoint's.
        adapters: whether adapters take part; without them it is the reference policy.
        weights: parameters that stand in for the model's own wherever it is used through this view.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        generation_config: Mapping[str, Any] | None,
        adapters: bool = True,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(FunctionalModel(model), model.config, tokenizer, {}, {}, 1)
        self.lora_enabled = adapters
        self._weights = dict(weights or {})
        self.generation_config = None if generation_config is None else dict(generation_config)

    @property
    def device(self) -> torch.device:
        return self._first_parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return self._first_parameter.dtype

    @property
    def _first_parameter(self) -> Tensor:
        parameter: Tensor = next(self.model.model.parameters())
        return parameter

    def weights(self) -> list[dict[str, Tensor]]:
        """What is swapped in: nothing where the model's own parameters are meant."""
        return [self._weights]

    def select(self, cells: Sequence[int]) -> LivePolicy:
        """There is one cell."""
        return self
