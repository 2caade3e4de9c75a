"""A transformers model whose weights are lent to it for the duration of a call.

The module keeps its buffers; parameters are the caller's tensors, put where the module looks for them (tied ones in all
of their places), so that one module serves every cell of a pack, the reference policy, and copies in other precisions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from klab.grid.errors import UserError

Weights = Mapping[str, Tensor]


class FunctionalModel:
    """A causal language model of any architecture, without dropout.

    Attributes:
        model: the module; a `peft.PeftModel` if it has adapters.
        base: the module that transformers made.
        vocabulary, hidden_size: rows and columns of its output embedding.
        cached: whether it can continue from kept keys and values.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        head = model.get_output_embeddings()
        if head is None:
            raise UserError("the model has no output embedding", file=model.name_or_path, key="policy.model")
        self._head: nn.Module = head
        self.vocab_size, self.hidden_size = (int(size) for size in head.weight.shape)
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._takes = frozenset(inspect.signature(self.base.forward).parameters)
        self.cached = "past_key_values" in self._takes and not getattr(self.base, "_is_stateful", False)
        self._places = _places(model)
        self._checkpointed: list[Any] = []
        self._lent: Weights = {}

    def emptied(self) -> dict[str, nn.Parameter]:
        """The module's own parameters by name, taken out of it."""
        taken = {}
        for name, places in self._places.items():
            module, attribute = places[0]
            taken[name] = own = cast(nn.Parameter, module._parameters[attribute])
            empty = nn.Parameter(torch.empty_like(own, device="meta"), requires_grad=False)
            for module, attribute in places:
                module._parameters[attribute] = empty
        return taken

    def checkpoint_gradients(self) -> None:
        """Keep the layers' inputs only and compute them again for the backward pass, where the model knows how to.

        Raises:
            UserError: it does not.
        """
        enable = getattr(self.base, "activation_checkpointing_enable", None) or self.base.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"the model cannot: {error}", key="policy.gradient_checkpointing", value=True) from error
        self._checkpointed = [each for each in self.base.modules() if getattr(each, "gradient_checkpointing", False)]
        for module in self._checkpointed:
            module._gradient_checkpointing_func = self._checkpoint

    def logits(
        self, weights: Weights, tokens: Tensor, present: Tensor, keep: int, cache: Any = None, adapters: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Logits [N, keep, V] and final hidden states [N, keep, width] of the last columns.

        Args:
            weights: by name; without those of adapters where these are off.
            tokens: [N, S] new tokens.
            present: bool [N, S' + S], which of the cached and the new ones are no padding.
            keep: columns that are wanted.
            cache: the keys and values of the S' tokens before, extended in place.
        """
        S = tokens.shape[1]
        positions = (present.long().cumsum(1) - 1).clamp_(min=0)[:, -S:]
        given: dict[str, Any] = {"attention_mask": present.long(), "position_ids": positions, "logits_to_keep": keep}
        given |= {"use_cache": cache is not None, "past_key_values": cache}
        seen: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        off = nullcontext() if adapters or not hasattr(self.model, "disable_adapter") else self.model.disable_adapter()
        try:
            with off, self.lending(weights), self._recomputing():
                out = self.model(input_ids=tokens, **{name: v for name, v in given.items() if name in self._takes})
        finally:
            hook.remove()
        return out.logits[:, -keep:], seen[-1][:, -keep:]

    @contextmanager
    def lending(self, weights: Weights) -> Iterator[None]:
        """The module with these weights."""
        before, self._lent = self._lent, weights
        owned = [(m, a, m._parameters[a]) for name in weights for m, a in self._places[name]]
        try:
            for name, value in weights.items():
                for module, attribute in self._places[name]:
                    module._parameters[attribute] = cast(nn.Parameter, value)
            yield
        finally:
            for module, attribute, own in owned:
                module._parameters[attribute] = own
            self._lent = before

    def _recomputing(self) -> Any:
        return _training(self._checkpointed, torch.is_grad_enabled())

    def _checkpoint(self, function: Callable[..., Any], *inputs: Any) -> Any:
        lent = self._lent

        def computed(*inputs: Any) -> Any:
            with self.lending(lent), _training(self._checkpointed, False):
                return function(*inputs)

        return checkpoint(computed, *inputs, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def _training(modules: list[Any], value: bool) -> Iterator[None]:
    """Modules in training mode or not, their children as they are: that mode is what switches recomputation on."""
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = value
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each parameter hangs, under the name of its first place."""
    found: dict[int, tuple[str, list[tuple[nn.Module, str]]]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                found.setdefault(id(parameter), (name, []))[1].append((module, attribute))
    return dict(found.values())
