"""The memory that training needs, from a model's configuration: at least, and about as much as it will be.

At least there must be what a step needs, whatever the micro-batch. Counted are weights, float32 master weights beside
16-bit ones, gradients (and the buffer in which a step makes 16-bit ones wide), Adam's moments, the frozen reference
policy, one that moves (with float32 means of 16-bit weights), and the critic. Of weights that processes share out
(`policy.sharding`) each has its part, and, while it samples and evaluates, whole weights beside it. For pretrained
models activations, logits, keys and values come on top where their sizes are known (`policy/footprint.py`), with
completions of full length. Samplers, reward models and the program itself are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, cast

from klab.grid import Cell
from klab.grid.kl_settings import compares_distributions, keeps_copy
from klab.harness.policy.footprint import Footprint, Workload
from klab.harness.policy.stacked.architecture import Architecture

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
"""Of a number of each `policy.dtype`."""

SPECIAL_TOKENS = 3
"""Tokens of a tiny policy's vocabulary beside the task's alphabet."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a policy consists of.

    Attributes:
        trained: parameters with gradients, per cell: all, or those of adapters.
        trained_bytes: of each of them.
        largest: parameters of the largest tensor among them.
        frozen_bytes: of the base that adapters stand on, once for all cells.
        hidden_size: width of the final hidden states, which value heads read.
        parameters: of the model without adapters.
    """

    trained: int
    trained_bytes: int
    largest: int
    frozen_bytes: int
    hidden_size: int
    parameters: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that a process needs at least, by what they are for.

    Attributes:
        cell: id of one of the cells that need them.
        parameters: of the model.
        per_cell: for every cell that is trained at once.
        shared: once for all of them.
        footprint, work: what passes through the model take, and how many tokens; None where that is not known.
        gathered: whole weights that a process holds for a time beside its part of all else; None where every process
            has everything.
        offloaded: whether the parts lie in host memory, and on the device only what is gathered.
    """

    cell: str
    parameters: int
    per_cell: dict[str, int]
    shared: dict[str, int]
    footprint: Footprint | None = None
    work: Workload | None = None
    gathered: int | None = None
    offloaded: bool = False

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> MemoryEstimate:
        """The estimate that `dataclasses.asdict` made a mapping of."""
        footprint, work = record["footprint"], record["work"]
        known = {"footprint": footprint and Footprint(**footprint), "work": work and Workload(**work)}
        return cls(**{**record, **known})

    def of_each(self, processes: int, on_gpu: bool = False) -> MemoryEstimate:
        """What each of so many processes needs, in its GPU's memory or in all that it has."""
        if self.gathered is None:
            return self
        kept = 0 if self.offloaded and on_gpu else 1
        per_cell, shared = (
            {name: kept * -(-value // processes) for name, value in group.items()}
            for group in (self.per_cell, self.shared)
        )
        return replace(self, per_cell=per_cell, shared={**shared, "gathered weights": self.gathered}, gathered=None)

    def parts(self, cells: int = 1) -> dict[str, int]:
        """Bytes for so many cells at once; what is not needed is left out."""
        found = {name: value * cells for name, value in self.per_cell.items()} | self.shared
        return {name: value for name, value in found.items() if value}

    def total(self, cells: int = 1) -> int:
        return sum(self.parts(cells).values())

    def passes(self, device: str, cells: int = 1, single: bool = False) -> dict[str, int]:
        """Bytes that passes through the model take on top, at the fuller of two moments: an update's, or sampling's, at
        which there are no gradients. Nothing where they are not known.

        Args:
            device: type of device.
            single: with one trajectory in a micro-batch, which is the least.
        """
        if self.footprint is None or self.work is None:
            return {}
        sizes, work = self.footprint, self.work
        tokens, own = work.micro_batch(sizes.engine, single)
        update = {"activations": sizes.activations(tokens) * cells, "logits": sizes.logits(own, device)}
        cache = self.cache(cells, single)
        gradients = sum(value for name, value in self.parts(cells).items() if name.endswith("gradients"))
        beyond = max(0, cache - gradients - sum(update.values()))
        return {**update, "keys and values in excess of an update's": beyond} if beyond else update

    def cache(self, cells: int = 1, single: bool = False) -> int:
        """Bytes for the keys and values of what is sampled at once; 0 where they are not known."""
        if self.footprint is None or self.work is None:
            return 0
        tokens = self.work.prompt + self.work.new if single else self.work.drawn()
        return self.footprint.cache(tokens) * cells


def memory_keys(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """One key per cell, equal for cells that need the same memory."""
    written: dict[int, str] = {}

    def text(section: Any) -> str:
        if id(section) not in written:
            written[id(section)] = section.model_dump_json()
        return written[id(section)]

    keys: list[tuple[str, ...]] = []
    for cell in cells:
        task = text(cell.task) if cell.policy.name != "hf" else ""  # a tiny policy's vocabulary is the task's
        critic = cell.training.critic
        work = "" if cell.policy.name != "hf" else f"{text(cell.task)}{workload_settings(cell)}"
        kind = critic.kind if critic is not None else ""
        keys.append((text(cell.policy), task, kind, work, cell.training.engine, _moving_reference(cell)))
    return keys


def _moving_reference(cell: Cell) -> Literal["", "as it is", "averaged"]:
    """Whether a cell holds a reference policy that moves, and whether its weights are means."""
    training, objective = cell.training, cell.objective
    if training.reference is None:  # most of a hundred thousand cells
        return ""
    if not keeps_copy(training, compares_distributions(objective, training.on_policy)):
        return ""
    return "averaged" if training.reference.ema else "as it is"


def workload_settings(cell: Cell) -> tuple[int | None, ...]:
    """The training settings that say how many tokens go through the model at once."""
    training = cell.training
    return (
        training.prompts,
        training.group_size,
        training.minibatches,
        training.micro_batch,
        training.token_budget,
        training.max_new_tokens,
        training.max_prompt_tokens,
        training.evaluation_prompts * training.evaluation_samples,
    )


def workload(cell: Cell, prompt: int, new: int) -> Workload:
    """How many tokens go through a cell's model at once, given the longest prompt and completion."""
    training = cell.training
    rows = training.prompts * training.group_size // training.minibatches
    sampled = max(training.prompts * training.group_size, training.evaluation_prompts * training.evaluation_samples)
    at_once = min(rows, training.micro_batch or rows)
    return Workload(prompt, new, at_once, training.group_size, sampled, training.token_budget)


def estimate_memory(
    cell: Cell, sizes: Sizes, footprint: Footprint | None = None, work: Workload | None = None
) -> MemoryEstimate:
    """What a cell needs."""
    critic, policy = cell.training.critic, cell.policy
    if getattr(policy, "sharding", "none") != "none":
        offloaded = getattr(policy, "offload", "none") != "none"
        return replace(_estimate_shared_out(cell, sizes, offloaded), footprint=footprint, work=work)
    per_cell = _trained(sizes.trained, sizes.trained_bytes)
    moving, narrow = _moving_reference(cell), sizes.trained_bytes < 4
    if moving:
        wide = 4 if narrow and moving == "averaged" else 0
        per_cell["moving reference"] = sizes.trained * (sizes.trained_bytes + wide)
    # whole weights are copied for the reference, once where cells start alike; adapters are only switched off
    shared = {"frozen base": sizes.frozen_bytes}
    shared["reference"] = 0 if sizes.frozen_bytes else sizes.trained * sizes.trained_bytes
    widened = 4 * sizes.largest if narrow else 0
    shared["float32 gradients"] = widened
    if critic is not None:
        head = _trained(sizes.hidden_size + 1, max(4, sizes.trained_bytes))
        own = _trained(sizes.trained, sizes.trained_bytes) if critic.kind == "model" else {}
        per_cell = per_cell | {"critic": sum(own.values()) + sum(head.values())}
        if critic.kind == "model":
            shared["critic's frozen base"], shared["critic's float32 gradients"] = sizes.frozen_bytes, widened
    return MemoryEstimate(cell.id, sizes.parameters, per_cell, shared, footprint, work)


def _estimate_shared_out(cell: Cell, sizes: Sizes, offloaded: bool) -> MemoryEstimate:
    """Of all processes together: the parts are wide, and serve as masters beside a computation in 16 bits."""
    wide, model = max(4, sizes.trained_bytes), sizes.trained * sizes.trained_bytes
    per_cell = {
        "weights": sizes.trained * wide,
        "gradients": sizes.trained * wide,
        "Adam moments": 2 * sizes.trained * wide,
    }
    reference = 0 if sizes.frozen_bytes else model
    gathered = sizes.frozen_bytes + model + reference  # an evaluation needs both
    shared = {"frozen base": sizes.frozen_bytes, "reference": reference}
    return MemoryEstimate(cell.id, sizes.parameters, per_cell, shared, gathered=gathered, offloaded=offloaded)


def _trained(count: int, each: int) -> dict[str, int]:
    """Bytes for parameters under AdamW (`StackedAdamW`)."""
    narrow, wide = each < 4, max(4, each)
    return {
        "weights": count * each,
        "float32 masters": count * wide if narrow else 0,
        "gradients": count * each,
        "Adam moments": 2 * count * wide,
    }


def tiny_sizes(section: Any, alphabet: str) -> Sizes:
    """The sizes of a tiny policy on a task with this alphabet. Loads torch only for adapters."""
    return stacked_sizes(section, tiny_architecture(section, len(alphabet) + SPECIAL_TOKENS))


def tiny_architecture(section: Any, vocabulary: int) -> Architecture:
    """The architecture that `tiny_config` describes, without loading transformers."""
    return Architecture(
        family=section.family,
        vocab_size=vocabulary,
        hidden_size=section.hidden,
        num_layers=section.layers,
        num_heads=section.heads,
        num_kv_heads=section.kv_heads or section.heads,
        head_dim=section.hidden // section.heads,
        intermediate_size=section.intermediate,
        norm_eps=1e-6,
        initializer_range=section.hidden**-0.5,
        qkv_bias=section.family == "qwen2",
        out_bias=False,
        mlp_bias=False,
        qk_norm=section.family == "qwen3",
        tied=False,
        context_length=256,
    )


def stacked_sizes(section: Any, architecture: Architecture) -> Sizes:
    """The sizes of a policy of the stacked engine.

    Raises:
        UserError: adapters on what is no linear layer of the model.
    """
    shapes = [prod(shape) for shape in architecture.parameter_shapes().values()]
    parameters, each = sum(shapes), BYTES[section.dtype]
    if section.lora is None:
        return Sizes(parameters, each, max(shapes), 0, architecture.hidden_size, parameters)
    from klab.harness.policy.stacked.lora import Adapters

    adapters = Adapters.from_section(section.lora, architecture)
    per_layer = sum(adapters.rank * sum(adapters.sizes[name]) for name in adapters.targets)
    trained = per_layer * adapters.num_layers
    largest = max(adapters.rank * max(adapters.sizes[name]) for name in adapters.targets)
    return Sizes(trained, max(4, each), largest, parameters * each, architecture.hidden_size, parameters)


def pretrained_sizes(section: Any, config: Any) -> Sizes | None:
    """The sizes of a pretrained model, from its transformers configuration; None where they cannot be told.

    Raises:
        UserError: the engine that the section asks for cannot run it, or it cannot have the adapters.
    """
    from klab.harness.policy.load import engine_for

    if engine_for(section, config) == "stacked":
        return stacked_sizes(section, Architecture.from_config(config))
    return _transformers_sizes(section, config)


def _transformers_sizes(section: Any, config: Any) -> Sizes | None:
    """Counted on the model itself, built on torch's device without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from klab.harness.policy.hf import peft
    from klab.harness.policy.hf.functional_model import FunctionalModel

    dtype, build = getattr(torch, section.dtype), cast(Any, AutoModelForCausalLM.from_config)
    with torch.device("meta"):
        try:
            model = build(config, dtype=dtype, trust_remote_code=False)
        except Exception:  # code of the checkpoint's own, which is not run here, or that needs actual numbers
            return None
        if section.lora is not None:
            model = peft.attach(model, section.lora)
    functional = FunctionalModel(model)
    own = functional.take_parameters()
    adapters = [value for name, value in own.items() if peft.is_adapter(name)]
    base = [value for name, value in own.items() if not peft.is_adapter(name)]
    parameters, width = sum(value.numel() for value in base), functional.hidden_size
    if section.lora is None:
        return Sizes(parameters, BYTES[section.dtype], _largest(base), 0, width, parameters)
    frozen = sum(value.numel() * value.element_size() for value in base)
    trained, each = sum(value.numel() for value in adapters), adapters[0].element_size()
    return Sizes(trained, each, _largest(adapters), frozen, width, parameters)


def _largest(tensors: Sequence[Any]) -> int:
    return max(int(value.numel()) for value in tensors)
