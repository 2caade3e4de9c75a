"""A transformers model as a function of its parameters, so that one module serves every cell of a pack.

The module keeps its buffers. Parameters are the caller's tensors, swapped in for the duration of a call (tied ones in
all of their places): those of a cell, of the reference policy, or of a copy in another precision. This is
`torch.func.functional_call`, which does not cover what is needed here beside the forward pass: recomputing layers in
the backward pass, and saving a checkpoint.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from klab.grid.errors import UserError
from klab.harness.policy.hf.output_layer import Finish, known_finish

Weights = Mapping[str, Tensor]


class FunctionalModel:
    """A causal language model of any architecture, without dropout.

    Parameters are put into `nn.Module._parameters`: assigning attributes, the public way, accepts no tensor that
    carries a gradient to a stack of cells. torch's own `functional_call` does the same.

    Attributes:
        model: the module; a `peft.PeftModel` if it has adapters.
        base: the module that transformers made.
        vocab_size, hidden_size: rows and columns of its output embedding.
        has_kv_cache: whether it can continue from cached keys and values.
        finish: what it makes of the products of its output embedding; None where that is not known.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        head = model.get_output_embeddings()
        if head is None:
            raise UserError("the model has no output embedding", file=model.name_or_path, key="policy.model")
        self._head: nn.Module = head
        self.vocab_size, self.hidden_size = (int(size) for size in head.weight.shape)
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._arguments = frozenset(inspect.signature(self.base.forward).parameters)
        # transformers has no public name for "its cache is a state that cannot be cut to a subset of sequences"
        self.has_kv_cache = "past_key_values" in self._arguments and not getattr(self.base, "_is_stateful", False)
        self._places = _parameter_places(model)
        self._checkpointed: list[Any] = []
        self._swapped_in: Weights = {}
        self.finish = self._find_finish()

    @torch.no_grad()
    def _find_finish(self) -> Finish | None:
        """See `known_finish`. The model runs once, on two tokens, with its own parameters, where these have memory."""
        if any(each.is_meta for each in self.model.parameters()):
            return None
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self._head.weight.device)  # type: ignore[arg-type]

        def logits_of(products: Tensor) -> Tensor:
            with self._head_gives(lambda _: products):
                return self({}, tokens, torch.ones_like(tokens, dtype=torch.bool), 2)[0]

        return known_finish(self._head, self.base.config.get_text_config(), logits_of)

    @contextmanager
    def _head_gives(self, made: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """The module with another output layer. Whatever is called before and after its own still is."""
        self._head.forward = made
        try:
            yield
        finally:
            del self._head.forward

    def final_states(
        self, weights: Weights, tokens: Tensor, attention_mask: Tensor, states_to_keep: int, adapters: bool = True
    ) -> Tensor:
        """Final hidden states [N, states_to_keep, hidden_size] as `__call__` gives them, without logits."""
        with self._head_gives(lambda states: states):
            return self(weights, tokens, attention_mask, states_to_keep, adapters=adapters)[1]

    def output_embedding(self, weights: Weights) -> tuple[Tensor, Tensor | None]:
        """Weight [vocab_size, hidden_size] and bias of the output layer, among these weights."""
        with self.swap_parameters(weights):
            return cast(Tensor, self._head.weight), cast("Tensor | None", self._head.bias)

    def take_parameters(self) -> dict[str, nn.Parameter]:
        """Take the module's own parameters out of it, by name; what stays holds no memory."""
        taken = {}
        for name, places in self._places.items():
            module, attribute = places[0]
            taken[name] = own = cast(nn.Parameter, module._parameters[attribute])
            empty = nn.Parameter(torch.empty_like(own, device="meta"), requires_grad=False)
            for module, attribute in places:
                module._parameters[attribute] = empty
        return taken

    def put_parameters(self, weights: Weights, requires_grad: bool) -> None:
        """Make tensors the module's own parameters, by the names that `take_parameters` gave them."""
        for name, value in weights.items():
            own = nn.Parameter(value, requires_grad=requires_grad)
            for module, attribute in self._places[name]:
                module._parameters[attribute] = own

    def parameters(self) -> dict[str, nn.Parameter]:
        """The module's own parameters, by the same names."""
        places = {name: every[0] for name, every in self._places.items()}
        return {name: cast(nn.Parameter, module._parameters[attribute]) for name, (module, attribute) in places.items()}

    def move_buffers(self, device: torch.device) -> None:
        for module in self.model.modules():
            for name, value in module._buffers.items():
                module._buffers[name] = value if value is None else value.to(device)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the layers' inputs for the backward pass and compute the layers again there.

        Raises:
            UserError: the model does not support it.
        """
        # transformers renamed the method; the name of older versions warns in newer ones
        enable = getattr(self.base, "activation_checkpointing_enable", None) or self.base.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": False, "preserve_rng_state": False, "context_fn": self._checkpoint_contexts})
        except ValueError as error:
            raise UserError(f"the model cannot: {error}", key="policy.gradient_checkpointing", value=True) from error
        self._checkpointed = [each for each in self.base.modules() if getattr(each, "gradient_checkpointing", False)]

    def __call__(
        self,
        weights: Weights,
        tokens: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        cache: Any = None,
        adapters: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Logits [N, logits_to_keep, vocab_size] and final hidden states [N, logits_to_keep, hidden_size].

        Args:
            weights: by name; without those of adapters where these are off.
            tokens: [N, S], new token ids.
            attention_mask: bool [N, S' + S], which of the cached and the new tokens are no padding.
            logits_to_keep: number of last columns that are wanted.
            cache: keys and values of the S' tokens before, extended in place.
        """
        S = tokens.shape[1]
        mask = attention_mask.long()
        positions = (mask.cumsum(1) - 1).clamp_(min=0)[:, -S:]
        given: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": logits_to_keep}
        given |= {"use_cache": cache is not None, "past_key_values": cache}
        states: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        off = nullcontext() if adapters or not hasattr(self.model, "disable_adapter") else self.model.disable_adapter()
        try:
            with off, self.swap_parameters(weights), _training(self._checkpointed, torch.is_grad_enabled()):
                out = self.model(input_ids=tokens, **{name: v for name, v in given.items() if name in self._arguments})
        finally:
            hook.remove()
        return out.logits[:, -logits_to_keep:], states[-1][:, -logits_to_keep:]

    @contextmanager
    def swap_parameters(self, weights: Weights) -> Iterator[None]:
        """The module with these tensors as its parameters; the ones before come back at the end."""
        before, self._swapped_in = self._swapped_in, weights
        replaced = [(m, a, m._parameters[a]) for name in weights for m, a in self._places[name]]
        try:
            for name, value in weights.items():
                for module, attribute in self._places[name]:
                    module._parameters[attribute] = cast(nn.Parameter, value)
            yield
        finally:
            for module, attribute, own in replaced:
                module._parameters[attribute] = own
            self._swapped_in = before

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What torch's `checkpoint` runs a layer in: nothing the first time, the same parameters the second."""
        return nullcontext(), _Recomputation(self, self._swapped_in)

    def recomputation(self, weights: Weights) -> ExitStack:
        """The module as it was in the forward pass; layers that are computed again are not checkpointed again."""
        with ExitStack() as stack:
            stack.enter_context(self.swap_parameters(weights))
            stack.enter_context(_training(self._checkpointed, False))
            return stack.pop_all()


class _Recomputation(AbstractContextManager[None]):
    """The backward pass of a checkpointed layer. Can be entered again, for a graph that is retained."""

    def __init__(self, model: FunctionalModel, weights: Weights) -> None:
        self.model, self.weights = model, weights
        self._stack = ExitStack()

    def __enter__(self) -> None:
        self._stack = self.model.recomputation(self.weights)

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


@contextmanager
def _training(modules: list[Any], value: bool) -> Iterator[None]:
    """Modules in training mode or not, their children as they are: in training mode they recompute."""
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = value
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


def _parameter_places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """The modules and attributes that hold each parameter, under the name of its first place."""
    found: dict[nn.Parameter, tuple[str, list[tuple[nn.Module, str]]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, attribute = name.rpartition(".")
        found.setdefault(parameter, (name, []))[1].append((model.get_submodule(owner), attribute))
    return dict(found.values())
