"""The least memory that the cells of a grid need, against what their jobs get: for `klab plan` and `klab launch`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from klab.grid import Cell, Grid, UserError
from klab.grid.schema.sections import Resources
from klab.harness.dispatch.gpus import gpu_memory_gb, visible_gpus
from klab.harness.dispatch.packing.packs import stacking_keys
from klab.harness.dispatch.slurm.options import memory_limit_gb
from klab.harness.preflight import MemoryEstimate, memory_keys
from klab.harness.store.machine import memory_gb

_GB = 2**30
"""Bytes of a GB, as Slurm counts them."""


@dataclass(frozen=True, slots=True)
class JobMemory:
    """What a job gets.

    Attributes:
        on_gpu: whether it trains on GPUs, each with a process of its own.
        limit_gb: of the node's memory, or of this machine's largest GPU; None where it is not known.
        processes: per node, which share the node's memory.
        cells_per_job: cells that are trained at once, as asked for; None: chosen later, at least one.
        together: processes on all nodes, which share out what `policy.sharding` says.
    """

    on_gpu: bool
    limit_gb: float | None
    processes: int
    cells_per_job: int | None
    together: int = 1

    @classmethod
    def planned(cls, resources: Resources, cells_per_job: int | None, device: str | None) -> JobMemory:
        """Of a job that may run anywhere."""
        on_gpu = device != "cpu" and (resources.gpus > 0 or bool(visible_gpus()))
        limit = None if on_gpu else cls._asked(resources)
        return cls(on_gpu, limit, resources.processes or 1, cells_per_job, resources.processes_per_job)

    @classmethod
    def on_slurm(cls, resources: Resources, cells_per_job: int | None) -> JobMemory:
        on_gpu = resources.gpus > 0
        limit = None if on_gpu else memory_limit_gb(resources)
        return cls(on_gpu, limit, resources.processes or 1, cells_per_job, resources.processes_per_job)

    @classmethod
    def here(cls, resources: Resources, cells_per_job: int | None, device: str | None) -> JobMemory:
        """Of a job on this machine, whose GPUs can be asked."""
        on_gpu = device != "cpu" and bool(visible_gpus())
        limit = gpu_memory_gb() if on_gpu else cls._asked(resources)
        here = min(resources.gpus, len(visible_gpus())) if on_gpu else 1
        return cls(on_gpu, limit, resources.processes or 1, cells_per_job, resources.processes or max(1, here))

    @staticmethod
    def _asked(resources: Resources) -> float | None:
        """What the user asked for; else this machine's memory, since nothing holds local jobs to the default."""
        return memory_limit_gb(resources) if "memory_gb" in resources.model_fields_set else memory_gb()


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """The least memory of a job with cells of one shape."""

    cell: Cell
    estimate: MemoryEstimate
    cells: int
    job: JobMemory

    @property
    def bytes(self) -> int:
        """Per GPU, or of a node on processors."""
        return self.estimate.total(self.cells) * (1 if self.job.on_gpu else self.job.processes)

    @property
    def device(self) -> str:
        return "cuda" if self.job.on_gpu else "cpu"

    def expected(self, single: bool = False) -> int:
        """About as many bytes as the job will take with completions of full length, per GPU or of a node; with
        `single` the least of them, one trajectory in a micro-batch."""
        on_top = sum(self.on_top(single).values())
        return self.bytes + on_top * (1 if self.job.on_gpu else self.job.processes)

    def on_top(self, single: bool = False) -> dict[str, int]:
        """What comes on top of the least of one process, by what it is for."""
        sampler = self.cell.training.sampler
        share = 0.0 if sampler is None or not self.job.on_gpu else sampler.share_while_training
        beside = {"vLLM": int(share * (self.job.limit_gb or 0.0) * _GB)}
        found = self.estimate.passes(self.device, self.cells, single) | beside
        return {name: value for name, value in found.items() if value}

    def passes_line(self) -> str | None:
        """For people: what is expected; None where it is not known."""
        work, sizes = self.estimate.work, self.estimate.footprint
        if work is None or sizes is None:
            return None
        tokens, _ = work.micro_batch(sizes.engine)
        parts = ", ".join(f"{name} {amount(value)}" for name, value in self.on_top().items())
        cache = amount(self.estimate.cache(self.cells))
        text = (
            f"memory: about {amount(self.expected())} with {tokens:,} tokens in a micro-batch (on top: {parts}; while "
            f"sampling, without gradients, keys and values {cache})"
        )
        limit = self.job.limit_gb
        if limit is None or self.expected() <= limit * _GB:
            return text
        processes = 1 if self.job.on_gpu else self.job.processes
        beside = sum(value for name, value in self.on_top().items() if name in ("logits", "vLLM"))
        fits = sizes.tokens_within(int(((limit * _GB - self.bytes) / processes - beside) / self.cells))
        default = work.token_budget is None and self.cell.training.micro_batch is None and self.job.on_gpu
        way = "and is about the default" if default else "fits"
        return f"{text}, of which there are {limit:.3g} GB: training.token_budget: {fits} {way}"

    def line(self) -> str:
        """For people."""
        asked = f" of the {self.job.limit_gb:.3g} GB" if self.job.limit_gb is not None else ""
        per = "per GPU" if self.job.on_gpu else "per node"
        return f"memory: at least {amount(self.bytes)}{asked} {per} for {self._job()} ({self._parts()})"

    def record(self) -> dict[str, Any]:
        """For programs; parts are those of one process."""
        return {
            "cell": self.cell.id,
            "parameters": self.estimate.parameters,
            "cells": self.cells,
            "per": "gpu" if self.job.on_gpu else "node",
            "processes": 1 if self.job.on_gpu else self.job.processes,
            "bytes": self.bytes,
            "parts": self.estimate.parts(self.cells),
            "expected_bytes": self.expected(),
            "on_top": self.on_top(),
            "cache_bytes": self.estimate.cache(self.cells),
        }

    def refusal(self, file: str) -> UserError | None:
        """The mistake of asking for less; None where it suffices or is not known."""
        limit = self.job.limit_gb
        if limit is None or self.expected(single=True) <= limit * _GB:
            return None
        what = f"training needs at least {amount(self.bytes)} for {self._job()} ({self._parts()})"
        if self.bytes <= limit * _GB:
            parts = ", ".join(f"{name} {amount(value)}" for name, value in self.on_top(single=True).items())
            what = f"{what}, and {amount(self.expected(single=True))} with a single trajectory ({parts})"
        if self.job.on_gpu:
            what = f"{what}, and the largest GPU here has {limit:.3g} GB"
            return UserError(what, file=file, key="policy", hint=self._hint([]))
        more = [f"resources.memory_gb: {math.ceil(self.bytes / _GB * 1.25)} or more"]
        return UserError(what, file=file, key="resources.memory_gb", value=limit, hint=self._hint(more))

    def _job(self) -> str:
        policy: Any = self.cell.policy
        count = self.estimate.parameters
        size = f"{count / 1e9:.2g} billion" if count >= 1e8 else f"{count:,}"
        model = policy.model if policy.name == "hf" else f"a {policy.name} policy"
        cells = "a cell" if self.cells == 1 else f"{self.cells} cells at once"
        times = f" in {self.job.processes} processes" if self.job.processes > 1 and not self.job.on_gpu else ""
        return f"{cells} of {model} with {size} parameters{times}"

    def _parts(self) -> str:
        return ", ".join(f"{name} {amount(value)}" for name, value in self.estimate.parts(self.cells).items())

    def _hint(self, options: list[str]) -> str:
        """The settings that lower the need."""
        policy: Any = self.cell.policy
        critic = self.cell.training.critic
        if self.cells > 1:
            options.append("resources.cells_per_job: 1")
        if self.job.processes > 1 and not self.job.on_gpu:
            options.append("resources.processes: 1")
        if policy.lora is None:
            options.append("policy.lora")
        if policy.dtype == "float64":
            options.append("policy.dtype: float32")
        elif policy.dtype == "float32" and policy.lora is not None and policy.name == "hf":
            options.append("policy.dtype: bfloat16")
        if policy.name == "hf" and self.job.on_gpu and not is_sharded(self.cell):
            options.append("policy.sharding: full with several resources.gpus")
        if critic is not None and critic.kind == "model":
            options.append("training.critic.kind: head")
        if not policy.gradient_checkpointing and self.estimate.work is not None:
            options.append("policy.gradient_checkpointing: true")
        return f"What helps: {'; '.join(options) or 'a smaller model'}. Activations come on top."


def memory_needs(
    study: Grid, estimates: Sequence[MemoryEstimate], checked: Grid, job: JobMemory
) -> Iterator[MemoryNeed]:
    """One need for every shape of the study's cells.

    Args:
        study: what is run.
        estimates: for cells of `checked`.
        checked: the grid as written, before equal algorithms were merged.
        job: what each job gets.
    """
    known = dict(zip((cell.id for cell in checked.cells), memory_keys(checked.cells), strict=True))
    members: dict[tuple[str, ...], list[Cell]] = {}
    for cell, key in zip(study.cells, memory_keys(study.cells), strict=True):
        members.setdefault(key, []).append(cell)
    for estimate in estimates:
        cells = members.get(known[estimate.cell], [])
        if cells:
            own = estimate.of_each(job.together, job.on_gpu)
            yield MemoryNeed(cells[0], own, 1 if is_sharded(cells[0]) else _at_once(cells, job.cells_per_job), job)


def refuse_lone_shares(study: Grid, job: JobMemory) -> None:
    """Raises UserError where weights are to be shared out among processes, and jobs have one process each."""
    alone = [cell for cell in study.cells if is_sharded(cell) and getattr(cell.policy, "offload", "none") == "none"]
    if alone and job.together == 1:
        raise UserError(
            "weights are shared out among the processes of a job, and resources give it one",
            file=study.file,
            key="policy.sharding",
            value="full",
            hint="Ask for several by resources.gpus (or, on processors, resources.processes), or write sharding: none.",
        )


def is_sharded(cell: Cell) -> bool:
    return bool(getattr(cell.policy, "sharding", "none") != "none")


def _at_once(cells: Sequence[Cell], asked: int | None) -> int:
    """How many of these cells the largest job trains at once."""
    if asked is None or asked == 1:
        return 1
    alike = Counter(stacking_keys({cell.id: cell.resolved() for cell in cells}).values())
    return min(asked, max(alike.values()))


def amount(number: int) -> str:
    """Bytes in MB or GB, as Slurm counts them, with three digits."""
    unit, name = (_GB, "GB") if number >= _GB / 10 else (2**20, "MB")
    return f"{number / unit:.3g} {name}"
