"""Tables and reward curves of `against_trl`, and the table of one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from klab.harness.training.runtime.timer import PHASES
from tests.benchmarks.setting import LORA_ALPHA, UPDATES_PER_ROLLOUT

PHASE_NAMES = (*PHASES[:3], "behaviour", *PHASES[3:])
"""`behaviour`: TRL computes the sampler's log-probabilities anew, klab keeps those it sampled with."""


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    return "\n\n".join([_one_update(found), _grids(found["grids"]), _limits(found), _rewards(found["grids"])]) + "\n"


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def _one_update(found: dict[str, Any]) -> str:
    lines = ["Milliseconds of processor time per cell and update, medians of interleaved rounds:", ""]
    sides = ("TRL", "TRL, klab's objective", "klab, one cell", "klab, a pack", "TRL ÷ one cell", "TRL ÷ pack")
    more = ("first update TRL / klab, s", "memory TRL / klab pack, MB")
    lines += _head("prompts × 8", "new tokens", *sides, *more)
    for shape in found["shapes"].values():
        trl, engine, alone, pack = (shape[side] for side in ("trl", "engine", "alone", "pack"))
        lines.append(
            _row(
                shape["prompts"],
                "≤ 8" if shape["budget"] == 8 else shape["budget"],
                f"{trl['cpu']:.0f}",
                f"{engine['cpu']:.0f} ({engine['cpu'] / trl['cpu'] - 1:+.0%})",
                f"{alone['cpu']:.1f}",
                f"{pack['cpu']:.1f} ({shape['packed']} cells)",
                f"{trl['cpu'] / alone['cpu']:.1f}",
                f"{trl['cpu'] / pack['cpu']:.1f}",
                f"{trl['first_update']:.1f} / {alone['first_update']:.1f}",
                f"{trl['peak_mb']:.0f} / {pack['peak_mb']:.0f}",
            )
        )
    return "\n".join(lines)


def _grids(grids: dict[str, Any]) -> str:
    some = next(iter(grids.values()))
    cells, measured = some["klab"]["cells"], some["trl"]["measured_cells"]
    updates = len(some["klab"]["curves"][0])
    lines = [
        f"A grid of {cells} cells × {updates} updates on two cores, wall time. klab: `klab launch --on local`. "
        f"TRL: a process per cell, two at a time, measured on {measured} cells and multiplied by {cells}/{measured}.",
        "",
        *_head("prompts × 8", "klab, s", "TRL, s", "TRL ÷ klab", "memory klab / TRL, MB"),
    ]
    for prompts, sides in grids.items():
        ours, theirs = sides["klab"], sides["trl"]
        memory = f"{ours['peak_mb']:.0f} / {theirs['peak_mb']:.0f}"
        ratio = f"{theirs['wall'] / ours['wall']:.1f}"
        lines.append(_row(prompts, f"{ours['wall']:.0f}", f"{theirs['wall']:.0f}", ratio, memory))
    return "\n".join(lines)


def _limits(found: dict[str, Any]) -> str:
    lines = [
        "Milliseconds of processor time per update and phase, and what matrix products alone need at this core's peak "
        f"({found['peak_gflops']:.0f} GFLOP/s). Plain: every trajectory in full, once per phase. Merged: the rows that "
        "klab really computes. Memory: what weights, gradients and moments of a pack's cells need between memory and "
        f"core ({found['stream_gb']:.1f} GB/s). Whoever overlaps both perfectly needs the larger of the two.",
        "",
        *_head("shape", "phase", "TRL", "klab pack", "plain", "merged", "memory", "klab ÷ (merged + memory)"),
    ]
    sides = ("trl", "pack", "floor_plain", "floor_klab", "floor_memory")
    for name, shape in found["shapes"].items():
        for phase in (*PHASE_NAMES, "all"):
            counted = PHASE_NAMES if phase == "all" else (phase,)
            values = {side: sum(shape[side].get(each, 0.0) for each in counted) for side in sides}
            least = values["floor_klab"] + values["floor_memory"]
            share = f"{values['pack'] / least:.1f}" if least else ""
            lines.append(_row(name.replace("x", " × 8, "), phase, *(f"{each:.1f}" for each in values.values()), share))
    return "\n".join(lines)


def _rewards(grids: dict[str, Any]) -> str:
    lines = [
        "Mean reward of the first and the last fifth of the updates, with 95 % intervals over seeds, and of the "
        "difference in the last fifth (Welch):",
        "",
        *_head("prompts × 8", "klab, first", "TRL, first", "klab, last", "TRL, last", "klab − TRL, last"),
    ]
    for prompts, sides in grids.items():
        ours, theirs = (np.array(sides[side]["curves"]) for side in ("klab", "trl"))
        fifth = max(1, ours.shape[1] // 5)
        cells = [
            _interval(side[:, part].mean(1)) for part in (slice(fifth), slice(-fifth, None)) for side in (ours, theirs)
        ]
        left, right = ours[:, -fifth:].mean(1), theirs[:, -fifth:].mean(1)
        if min(len(left), len(right)) > 1:
            interval = stats.ttest_ind(left, right, equal_var=False).confidence_interval()
            difference = f"{left.mean() - right.mean():+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
        else:
            difference = f"{left.mean() - right.mean():+.3f}"
        lines.append(_row(prompts, *cells, difference))
    return "\n".join(lines)


def _interval(values: np.ndarray) -> str:
    if len(values) < 2:
        return f"{values.mean():.3f}"
    return f"{values.mean():.3f} ± {_half_width(values[:, None])[0]:.3f}"


def _half_width(values: np.ndarray) -> np.ndarray:
    """95 % of Student's t over the first axis."""
    n = len(values)
    if n < 2:
        return np.zeros(values.shape[1])
    width: np.ndarray = stats.t.ppf(0.975, n - 1) * values.std(0, ddof=1) / np.sqrt(n)
    return width


def curves_figure(grids: dict[str, Any], file: Path) -> None:
    """Mean reward over updates of both, means of ten updates, with the seeds' 95 % intervals."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (prompts, sides) in zip(figure.subplots(1, len(grids), sharey=True), grids.items(), strict=True):
        for (side, label), colour in zip((("klab", "klab"), ("trl", "TRL 1.16")), ("#2a6fbb", "#d1662b"), strict=True):
            curves = np.array(sides[side]["curves"])
            step = max(1, min(10, curves.shape[1] // 5))
            length = curves.shape[1] // step * step
            means = curves[:, :length].reshape(len(curves), -1, step).mean(2)
            at = np.arange(means.shape[1]) * step + step / 2
            width = _half_width(means)
            axes.plot(at, means.mean(0), color=colour, label=f"{label}, {len(curves)} seeds")
            axes.fill_between(at, means.mean(0) - width, means.mean(0) + width, color=colour, alpha=0.2, linewidth=0)
        axes.set_title(f"{prompts} prompts × 8")
        axes.set_xlabel("update")
        axes.legend(frameon=False, loc="lower right")
    figure.axes[0].set(ylabel="mean reward", ylim=(0, 1))
    figure.savefig(file, dpi=150)


def device_table(found: dict[str, Any]) -> str:
    """Markdown, from what `one_device.compare` found."""
    K, told = found["at_once"], found["told"]
    at_a_time = told["rows"] or told["prompts"] * told["group_size"]
    head = ("cells", "TRL, one ÷ this", f"TRL, {K} at once ÷ this", "ms per cell and update", *PHASE_NAMES, "the rest",
            "decoded tokens/s", "peak memory, GiB", "first update, s")  # fmt: skip
    trained = f"adapters of rank {told['lora_rank']} (alpha {LORA_ALPHA:.0f}) on every linear layer"
    clock = "Processor time" if told["clock"] == "processor" else "Wall time with the device synchronised"
    floor = ""
    if found["floor_ms"] is not None:
        floor = (
            f" Products alone, every trajectory in full, take {found['floor_ms']:.0f} ms at this core's measured peak "
            f"({found['peak_gflops']:.0f} GFLOP/s in float32)."
        )
    lines = [
        f"{found['shape'].partition(',')[0]} with random weights on {found['device']}: {told['dtype']}, "
        f"{'all weights' if told['lora_rank'] is None else trained}, {told['prompts']} prompts × "
        f"{told['group_size']} completions of at most {told['new_tokens']} tokens, {at_a_time} trajectories at a time, "
        f"{UPDATES_PER_ROLLOUT} updates per rollout; klab's decoding is {found['decoding']}. {clock}, "
        f"medians over rollouts, then over rounds ({found['rounds']}). Where {K} processes run at once, "
        "a cell's time is divided by their number, memory is their sum, the first update is that of the last of them. "
        "Memory is what tensors held at the peak; on a CPU it is the processes' own." + floor,
        "",
        *_head(found["device"], *head),
    ]
    for row in found["rows"].values():
        cells = row["processes"] * row["cells"]
        if "failed" in row:
            lines.append(_row(row["name"], cells, "—", "—", row["failed"], *["—"] * (len(head) - 4)))
            continue
        ms, ratios = row["ms"], [row.get(f"{key}_over_this") for key in ("trl", "trl_at_once")]
        phases = [ms.get(phase, 0.0) for phase in PHASE_NAMES]
        lines.append(
            _row(
                row["name"],
                cells,
                *("—" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                *(f"{each:.1f}" for each in (ms["update"], *phases, ms["update"] - sum(phases))),
                f"{row['tokens_per_second']:.0f}",
                f"{row['peak_mb'] / 1024:.2f}",
                f"{row['first_update']:.1f}",
            )
        )
    return "\n".join(lines) + "\n"
