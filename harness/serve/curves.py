"""The curves and completions of cells, read on from where the last look ended; of the cells that are looked at only."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klab.harness.serve.series import Series, columns, finite, mean_of
from klab.harness.serve.text import clipped
from klab.harness.store.tail import Tail

CELLS = 512
"""Cells whose curves are kept; those that nobody looked at for longest are dropped, and read again when needed."""
EVALUATIONS = 8
"""Newest evaluations of a cell whose completions are kept."""
COMPLETIONS = 8
"""Completions of an evaluation that are kept, of what the file has."""
LETTERS = 1200
"""Letters of a prompt or a completion that are kept."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A quantity over updates: its column in `evaluations.jsonl` (of held-out prompts) or `metrics.jsonl`."""

    key: str
    title: str
    unit: str
    held_out: bool


PANELS = (
    Panel("reward", "held-out reward", "", True),
    Panel("reward_mean", "training reward", "", False),
    Panel("reverse_kl", "KL to the reference", "nats per trajectory, held-out", True),
    Panel("k3", "KL to the reference, k3", "nats per token of the rollout", False),
    Panel("entropy", "entropy", "nats per token of the rollout", False),
    Panel("accuracy", "held-out accuracy", "greedy", True),
    Panel("gradient_norm", "gradient norm", "before clipping", False),
    Panel("clip_fraction", "clip fraction", "tokens with weight 0", False),
    Panel("length_mean", "length", "tokens", False),
)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The completions that one evaluation wrote down."""

    update: int
    samples: tuple[dict[str, Any], ...]


class CellCurves:
    """What one cell has measured so far.

    Attributes:
        series: by the key of a panel.
        evaluations: the newest ones, oldest first.
    """

    def __init__(self, run: Path, identity: str) -> None:
        self.series: dict[str, Series] = {}
        self.evaluations: deque[Evaluation] = deque(maxlen=EVALUATIONS)
        self._metrics = Tail(run, ("cells", identity, "metrics.jsonl"))
        self._held_out = Tail(run, ("cells", identity, "evaluations.jsonl"))

    @property
    def problem(self) -> str | None:
        """Why a file cannot be read to its end."""
        return self._metrics.problem or self._held_out.problem

    @property
    def behind(self) -> bool:
        """Whether the next look has more to read, without waiting for anything new."""
        return self._metrics.behind or self._held_out.behind

    def look(self) -> None:
        """Read on."""
        for tail, held_out in ((self._metrics, False), (self._held_out, True)):
            rows, anew = tail.look()
            if anew:
                self._forget(held_out)
            for row in rows:
                update = row.get("update")
                if type(update) is int:
                    self._add(update, row, held_out)

    def last(self, key: str) -> float | None:
        """The newest value."""
        return self.series[key].last if key in self.series else None

    def _forget(self, held_out: bool) -> None:
        for panel in PANELS:
            if panel.held_out == held_out:
                self.series.pop(panel.key, None)
        if held_out:
            self.evaluations.clear()

    def _add(self, update: int, row: Mapping[str, Any], held_out: bool) -> None:
        for panel in PANELS:
            if panel.held_out == held_out and finite(row.get(panel.key)) is not None:
                self.series.setdefault(panel.key, Series()).add(update, row[panel.key])
        samples = row.get("samples") if held_out else None
        if isinstance(samples, list) and samples:
            kept = [_sample(each) for each in samples[:COMPLETIONS] if isinstance(each, Mapping)]
            self.evaluations.append(Evaluation(update, tuple(kept)))


class CurveShelf:
    """The curves of the cells of a run that were looked at lately."""

    def __init__(self, run: Path, most: int = CELLS) -> None:
        self._run = run
        self._most = most
        self._cells: OrderedDict[str, CellCurves] = OrderedDict()

    def __len__(self) -> int:
        return len(self._cells)

    def look(self, identity: str) -> CellCurves:
        """The curves of a cell, up to now."""
        curves = self._cells.pop(identity, None) or CellCurves(self._run, identity)
        self._cells[identity] = curves
        while len(self._cells) > self._most:
            self._cells.popitem(last=False)
        curves.look()
        return curves


def lines(cells: Sequence[CellCurves]) -> dict[str, dict[str, list[float | None]]]:
    """By the key of a panel, the line of one cell, or of the mean over the cells of one configuration."""
    found = {}
    for panel in PANELS:
        points = mean_of([cell.series[panel.key] for cell in cells if panel.key in cell.series])
        if points:
            found[panel.key] = columns(points)
    return found


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": clipped(sample.get("prompt"), LETTERS),
        "completion": clipped(sample.get("completion"), LETTERS),
        "reward": finite(sample.get("reward")),
    }
