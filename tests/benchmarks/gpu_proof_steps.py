"""What `gpu_proof` does on a device, one function per question: each returns Markdown, or says why it is left out."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from klab.grid import parse_grid
from klab.harness.policy.footprint import Footprint
from klab.harness.policy.pretrained import GENERATION_CONFIG, read_config
from klab.harness.policy.rollout import Rollout
from klab.harness.policy.sampling.sample import sample
from klab.harness.policy.sampling.sampler import SamplingOptions
from klab.harness.policy.stacked.block_decoding import VARIABLE
from klab.harness.policy.stacked.policy import StackedPolicy
from klab.harness.preflight.checks import passes
from klab.harness.preflight.memory import estimate_memory, pretrained_sizes
from klab.harness.store import machine
from klab.harness.training import checkpoint
from klab.harness.training import pack as packs
from klab.harness.training.data.rollouts import log_probabilities
from klab.harness.training.packed_cell import PackedCell
from klab.harness.training.runtime.oom import free_memory
from klab.tasks import load_task
from tests.benchmarks import gpu
from tests.benchmarks.shapes import Shape, Strings

ROOT = Path(__file__).parents[2]
GSPO_EPSILON = 3e-4
"""Where GSPO begins to clip the ratio of a sequence (Zheng et al. 2025)."""


class LeftOut(Exception):
    """A question that cannot be answered here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What is trained, where, and until when.

    Attributes:
        start: a checkpoint of the shape with random weights.
        best: bytes and FLOP per second that the device is capable of, where known.
        deadline: by `time.monotonic`.
    """

    name: str
    shape: Shape
    start: Path
    device: torch.device
    best: tuple[float | None, float | None]
    trl: Path
    deadline: float

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def pack(self, cells: int = 1, lora: int | None = None, **training: Any) -> packs.Pack:
        """Cells of the shape, in training."""
        shape = self.shape
        given = {"updates": 1000, "prompts": shape.prompts, "group_size": shape.group_size, "lr": 1e-6}
        given |= {"max_new_tokens": shape.new_tokens, "micro_batch": shape.micro_batch, "evaluate_every": 1000}
        section = {"name": "hf", "model": str(self.start), "dtype": shape.dtype}
        grid = {
            "name": "proof",
            "task": {"name": "tests.benchmarks.shapes:Strings", "length": shape.prompt_tokens},
            "policy": section if lora is None else {**section, "lora": {"rank": lora}},
            "training": {**given, **training},
            "objective": {"algorithm": "grpo"},
            "seeds": cells,
        }
        found = parse_grid(json.dumps(grid), "proof").cells
        task = load_task(found[0].task)
        return packs.Pack([PackedCell(cell, task, self.start) for cell in found])

    def synchronise(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(each) for each in line)} |" for line in lines)


def versions(setting: Setting) -> str:
    """The machine."""
    card = torch.cuda.get_device_name(setting.device) if setting.on_cuda else f"{setting.device} (no GPU)"
    found = {**machine.versions(), "CUDA": torch.version.cuda}
    if setting.on_cuda:
        found["memory"] = f"{torch.cuda.get_device_properties(setting.device).total_memory / 1e9:.1f} GB"
    return f"{card}; {', '.join(f'{name} {value}' for name, value in found.items() if value)}."


@contextmanager
def _decoding(kind: str) -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = kind
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def decoding(setting: Setting) -> str:
    """Does decoding in fixed memory draw the tokens that plain decoding draws, and how fast are both?"""
    shape = setting.shape
    policy = StackedPolicy.from_pretrained(setting.start, dtype=getattr(torch, shape.dtype), device=setting.device)
    examples = Strings(shape.prompt_tokens).split("train")[: shape.prompts]
    prompts = [[policy.tokenizer(example.prompt)["input_ids"] for example in examples]]
    options = SamplingOptions(group_size=shape.group_size, max_new_tokens=shape.new_tokens)
    seconds: dict[str, list[float]] = {"static": [], "growing": []}
    drawn: dict[str, Rollout] = {}
    for _ in range(3):  # the first two warm up
        for kind, times in seconds.items():
            with _decoding(kind):
                setting.synchronise()
                began = time.perf_counter()
                (drawn[kind],) = sample(policy, prompts, [torch.Generator().manual_seed(0)], options)
                setting.synchronise()
                times.append(time.perf_counter() - began)
    static, growing = drawn["static"], drawn["growing"]
    T = min(static.tokens.shape[1], growing.tokens.shape[1])
    equal = (static.tokens[:, :T] == growing.tokens[:, :T]) & static.mask[:, :T] & growing.mask[:, :T]
    together = equal.cumprod(1).bool()  # until the first token that differs
    gap = (static.logp[:, :T] - growing.logp[:, :T]).abs()[together]
    share = float(together.sum() / growing.mask.sum())
    rows = [
        (kind, int(drawn[kind].mask.sum()), f"{times[-1]:.2f}", f"{int(drawn[kind].mask.sum()) / times[-1]:.0f}")
        for kind, times in seconds.items()
    ]
    return (
        f"{table(('decoding', 'tokens', 'seconds', 'tokens/s'), rows)}\n\n"
        f"Equal up to the first difference: {share:.1%} of the tokens; |Δ log-probability| there: mean "
        f"{float(gap.mean()):.1e}, largest {float(gap.max()):.1e}."
    )


def synchronisations(setting: Setting) -> str:
    """Where does the host wait for the device during a rollout and an update?"""
    if not setting.on_cuda:
        raise LeftOut("CUDA counts them")
    pack = setting.pack()
    pack.advance()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            pack.advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{_short(each.filename)}:{each.lineno}" for each in caught if "synchroniz" in str(each.message))
    return f"{sum(places.values())} in all.\n\n{table(('place', 'times'), places.most_common(12))}"


def _short(file: str) -> str:
    return file.rsplit("site-packages/", 1)[-1].removeprefix(f"{ROOT}/")


def lengths(setting: Setting) -> str:
    """Five updates with completions of mixed lengths: what is recorded anew, and how much memory is kept?"""
    shape, rows = setting.shape, []
    for new in (shape.new_tokens, 4 * shape.new_tokens):
        with mixed_lengths(setting.start, shape, new):
            free_memory()
            pack = setting.pack(max_new_tokens=new, token_budget=None if shape.micro_batch is None else 16384)
            policy: Any = pack.policy
            for number in range(1, 6):
                before = set(policy.steps.recorded)
                (row,) = pack.advance()
                spent = [f"{row[f'seconds_{phase}']:.2f}" for phase in ("rollout", "reference", "forward", "backward")]
                kept = [torch.cuda.memory_allocated(), torch.cuda.memory_reserved()] if setting.on_cuda else []
                memory = " / ".join(f"{size / 1e9:.1f}" for size in kept) or "—"
                anew = len(set(policy.steps.recorded) - before)
                rows.append((new, number, f"{row['length_mean']:.0f}", anew, *spent, memory))
            del pack, policy
    head = ("budget", "update", "mean length", "recorded", "rollout s", "reference s", "forward s", "backward s")
    return table((*head, "GB allocated / reserved"), rows)


@contextmanager
def mixed_lengths(start: Path, shape: Shape, new: int) -> Iterator[None]:
    """So many tokens end a completion that one with random tokens ends after half of its budget on average."""
    vocabulary = shape.config["vocab_size"]
    count = min(vocabulary // 2, max(1, 2 * vocabulary // new))
    file = start / GENERATION_CONFIG
    file.write_text(json.dumps({"eos_token_id": list(range(vocabulary - count, vocabulary))}))
    try:
        yield
    finally:
        file.unlink()


def updates(setting: Setting) -> str:
    """How much of the device do rollouts and updates use, whole and as packs of adapters, and is `plan` right?"""
    shape, rows = setting.shape, []
    alone = None
    for cells, rank in ((1, None), (1, 16), (shape.packs[-1], 16)):
        free_memory()
        found = gpu.measure(shape, setting.start, cells, rank, rounds=3)
        alone = found if cells == 1 else alone
        assert alone is not None
        bandwidth, arithmetic = setting.best
        rows.append(
            (
                "all weights" if rank is None else f"adapters, {cells}",
                f"{found.tokens / found.rollout_seconds:.0f}",
                f"{found.trained / found.update_seconds:.0f}",
                f"{1e3 * found.seconds / cells:.0f}",
                f"{cells * alone.seconds / found.seconds:.2f}",
                "—" if bandwidth is None else f"{found.bytes_read / found.rollout_seconds / bandwidth:.0%}",
                "—" if arithmetic is None else f"{found.flop / found.update_seconds / arithmetic:.0%}",
                f"{found.peak_bytes / 1e9:.1f}",
                f"{_expected(setting, cells, rank) / 1e9:.1f}",
            )
        )
    head = ("trained", "decoded tokens/s", "trained tokens/s", "ms per cell and update", "alone ÷ this")
    return table((*head, "of the bandwidth", "of the arithmetic", "peak GB", "GB as planned"), rows)


def _expected(setting: Setting, cells: int, rank: int | None) -> int:
    """Bytes that `klab plan` expects of such a pack."""
    (member,) = setting.pack(1, rank).members
    free_memory()
    cell, config = member.cell, read_config(setting.start)
    tokenizer = StackedPolicy.from_pretrained(setting.start).tokenizer
    footprint, work = passes(cell, member.task, (tokenizer, config))
    assert isinstance(footprint, Footprint)
    sizes = pretrained_sizes(cell.policy, config)
    assert sizes is not None
    estimate = estimate_memory(cell, sizes, footprint, work)
    return estimate.total(cells) + sum(estimate.passes(setting.device.type, cells).values())


def old_policy(setting: Setting) -> str:
    """How far is the decoder's π_old from the trainer's before any update, where a rollout serves four?"""
    rows = []
    for source in ("sampler", "trainer"):
        pack = setting.pack(updates_per_rollout=4, old_logprobs=source)
        pack.collect_due_rollouts()
        rollout = pack.pending[0][0].rollout
        (seen,) = log_probabilities(pack.policy, [rollout], pack.settings.temperature, pack.budget)
        old = pack.pending[0][0].old_logprobs
        gaps = (seen - (rollout.logp if old is None else old)).where(rollout.mask, 0.0)
        mean = gaps.sum(1).abs() / rollout.mask.sum(1).clamp(min=1)
        (row,) = pack.advance()
        beyond = float((mean > GSPO_EPSILON).double().mean())
        rows.append((source, f"{row['ratio_mean']:.5f}", f"{row['ratio_max']:.4f}", f"{beyond:.0%}"))
        del pack
        free_memory()
    return table(("π_old", "mean ratio", "largest ratio", f"sequences beyond ε = {GSPO_EPSILON:g}"), rows)


def hot_spots(setting: Setting) -> str:
    """Where does the time of a rollout with its update go, kernel by kernel?"""
    pack = setting.pack()
    pack.advance()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_cuda else [])]
    with profile(activities=activities) as profiler:
        pack.advance()
        setting.synchronise()
    key = "self_device_time_total" if setting.on_cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda each: -getattr(each, key))
    total = sum(getattr(each, key) for each in events) or 1
    rows = [(each.key[:60], each.count, f"{getattr(each, key) / total:.1%}") for each in events[:12]]
    return table(("operation", "calls", "share"), rows)


def saving(setting: Setting) -> str:
    """What does a checkpoint cost in time, disk and host memory?"""
    pack = setting.pack()
    pack.advance()
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        checkpoint.write(Path(folder) / "c", pack.state(0))
        seconds = time.perf_counter() - began
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        size = (Path(folder) / "c" / checkpoint.FILE).stat().st_size
    return f"{size / 1e9:.2f} GB in {seconds:.1f} s; the peak of host memory grew by {grown / 2**10:.0f} MiB."


def beside_trl(setting: Setting) -> str:
    """Beside TRL in the same minutes, on the same device."""
    if setting.device.type not in ("cuda", "cpu"):
        raise LeftOut(f"TRL knows no device {setting.device.type!r}")
    if not setting.trl.exists():
        raise LeftOut(f"there is no {setting.trl}; `make .venv-parity/installed` makes it")
    with tempfile.TemporaryDirectory() as out:
        words = ["--setting", setting.name, "--rounds", "1", "--timed", "6", "--only", "trl", "klab", "--out", out]
        command = [sys.executable, "-m", "tests.benchmarks.against_trl", *words, "--trl", str(setting.trl)]
        left = max(1.0, setting.deadline - time.monotonic())
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired as late:
            raise LeftOut(f"it did not end in the {left:.0f} s that were left") from late
        pages = list(Path(out).glob("*.md"))
        if done.returncode or not pages:
            raise LeftOut(f"it ended with code {done.returncode}: {done.stderr.strip()[-400:]}")
        return pages[0].read_text()


def with_vllm(setting: Setting) -> str:
    """Three updates whose rollouts vLLM draws in the trainer's process."""
    if find_spec("vllm") is None:
        raise LeftOut("vLLM is not installed (pip install 'klab[vllm]')")
    if not setting.on_cuda:
        raise LeftOut("vLLM needs a GPU")
    pack = setting.pack(sampler={"engine": "vllm"})
    rows = []
    for number in range(1, 4):
        (row,) = pack.advance()
        rate = row["tokens"] / row["seconds_rollout"]
        rows.append((number, f"{rate:.0f}", f"{row['sampler_kl']:.1e}", f"{row['sampler_ess']:.3f}"))
    return table(("update", "decoded tokens/s with the weights' way there", "KL(μ‖π_old)", "ESS"), rows)


STEPS: dict[str, Callable[[Setting], str]] = {
    "The machine": versions,
    "Decoding": decoding,
    "Waits for the device": synchronisations,
    "Mixed lengths": lengths,
    "Use of the device": updates,
    "π_old": old_policy,
    "Where the time goes": hot_spots,
    "A checkpoint": saving,
    "TRL": beside_trl,
    "vLLM": with_vllm,
}
