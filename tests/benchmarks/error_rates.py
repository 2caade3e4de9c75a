"""Error rates of everything that `klab.reports.analyse` asserts: `python -m tests.benchmarks.error_rates`.

Studies are simulated from score[c, s] = μ[c] + b[s] + Σ u[axis, value, s] + ε[c, s] and analysed as the report does.
Each line is one target with the measured rate, its Monte Carlo standard error and whether it is met. Half an hour on
one core by default; `--replications 100` is a glance.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from klab.reports import analyse
from klab.reports.inference import Analysis
from klab.reports.inference.error_rate import look_share

Cell = Mapping[str, int]
Array = NDArray[np.float64]


def crossed(*levels: int) -> list[Cell]:
    """All combinations of so many values on axes a, b, …; the baseline first."""
    names = "abcdefgh"[: len(levels)]
    return [dict(zip(names, values, strict=True)) for values in product(*map(range, levels))]


def one_at_a_time(*others: int) -> list[Cell]:
    """The baseline, and each axis changed alone to each of so many other values."""
    names = "abcdefgh"[: len(others)]
    base = dict.fromkeys(names, 0)
    return [
        base,
        *({**base, name: value + 1} for name, count in zip(names, others, strict=True) for value in range(count)),
    ]


DESIGNS = {"prod": crossed(3, 3, 3), "one": one_at_a_time(3, 3, 3), "200": crossed(5, 5, 8)}


class Condition(NamedTuple):
    """Standard deviations in units of the run's: seed × axis, and the spread of log sd over cells."""

    name: str
    seed_axis: float
    spread: float
    limit: float


CONDITIONS = (
    Condition("iid", 0.0, 0.0, 0.06),
    Condition("seed × axis 0.35", 0.35, 0.0, 0.07),
    Condition("seed × axis 0.7", 0.7, 0.0, 0.07),
    Condition("log-sd 0.35", 0.0, 0.35, 0.07),
    Condition("log-sd 0.7", 0.0, 0.7, 0.07),
)
IID = CONDITIONS[0]


def simulate(
    cells: Sequence[Cell], seeds: int, condition: Condition, means: Array, generator: np.random.Generator
) -> pd.DataFrame:
    """A tidy frame of finished runs; the seeds themselves have the standard deviation of a run."""
    count = len(cells)
    deviation = np.exp(condition.spread * generator.standard_normal(count))
    scores = means[:, None] + deviation[:, None] * generator.standard_normal((count, seeds))
    scores += generator.standard_normal(seeds)
    for axis in cells[0]:
        codes = np.asarray([cell[axis] for cell in cells])
        scores += condition.seed_axis * generator.standard_normal((int(codes.max()) + 1, seeds))[codes]
    axes = {axis: np.repeat([cell[axis] for cell in cells], seeds) for axis in cells[0]}
    runs = {"seed": np.tile(np.arange(seeds), count), "score": scores.ravel(), "state": "finished"}
    return pd.DataFrame({**axes, **runs})


class Outcome(NamedTuple):
    """What one analysis got right: nothing false asserted, all contrasts covered, the best cell's mean covered, and the
    share of contrasts that were found to differ."""

    clean: bool
    covered: bool
    best: bool
    found: float


def outcome(cells: Sequence[Cell], frame: pd.DataFrame, means: Array) -> Outcome:
    """Analyse one study whose true means are known."""
    found = analyse(frame, cells[0])
    truth = {tuple(cell.values()): float(mean) for cell, mean in zip(cells, means, strict=True)}
    axes = list(cells[0])
    differences = np.asarray([truth[tuple(row)] for row in found.contrasts[axes].to_numpy().tolist()]) - means[0]
    contrasts = found.contrasts
    tables = (contrasts, found.levels, found.effects, found.interactions)
    asserted = any((table["verdict"] == "differs").any() for table in tables)
    silent = found.headline.startswith("No difference") and "No winner" in found.headline
    silent |= found.headline.startswith("No difference") and "baseline has the best mean" in found.headline
    assert found.best is not None
    best = truth[tuple(found.best.cell[axis] for axis in axes)]
    return Outcome(
        clean=not asserted and silent,
        covered=bool(((contrasts["low"] <= differences) & (differences <= contrasts["high"])).all()),
        best=found.best.low <= best <= found.best.high,
        found=float((contrasts["verdict"] == "differs").mean()),
    )


def outcomes(
    design: str,
    seeds: int,
    condition: Condition,
    replications: int,
    seed: int,
    effects: float = 0.0,
    shift: float = 0.0,
) -> Iterator[Outcome]:
    """Analyses of simulated studies; true means have the standard deviation `effects`, and all but the baseline's are
    higher by `shift`."""
    cells = DESIGNS[design]
    generator = np.random.default_rng([seed, seeds, len(cells), CONDITIONS.index(condition)])
    for _ in range(replications):
        means = effects * generator.standard_normal(len(cells))
        means[1:] += shift
        yield outcome(cells, simulate(cells, seeds, condition, means, generator), means)


class Extended(NamedTuple):
    """What two looks at a growing study got right: nothing false asserted at either of them; and the share of contrasts
    that were found in the end."""

    clean: bool
    found: float


def extended(
    design: str,
    first: int,
    added: int,
    condition: Condition,
    replications: int,
    seed: int,
    shift: float = 0.0,
    spending: str | None = "obrien_fleming",
) -> Iterator[Extended]:
    """Studies that get `added` seeds after a look at `first`, in cells whose comparison is open and in the baseline.

    Without `spending` each look uses the whole error rate: what looking twice costs.
    """
    cells = DESIGNS[design]
    generator = np.random.default_rng([seed, first, added, len(cells), CONDITIONS.index(condition)])
    looks, most = (first, first + added), first + added
    shares = [look_share(looks[: k + 1], most, spending) if spending else 1.0 for k in range(2)]
    for _ in range(replications):
        means = np.zeros(len(cells))
        means[1:] += shift
        frame = simulate(cells, most, condition, means, generator)
        early = frame[frame["seed"] < first]
        found = analyse(early, cells[0], share=shares[0])
        open_ = found.contrasts.loc[found.contrasts["verdict"] == "undecided", list(cells[0])]
        kept = {tuple(cells[0].values()), *map(tuple, open_.to_numpy().tolist())}
        grown = np.asarray([tuple(row) in kept for row in frame[list(cells[0])].to_numpy().tolist()])
        later = analyse(frame[(frame["seed"] < first) | grown], cells[0], share=shares[1])
        differing = float((later.contrasts["verdict"] == "differs").mean())
        yield Extended(not _asserts(found) and not _asserts(later), differing)


def _asserts(found: Analysis) -> bool:
    tables = (found.contrasts, found.levels, found.effects, found.interactions)
    return any(bool((table["verdict"] == "differs").any()) for table in tables)


class Line(NamedTuple):
    """One target."""

    what: str
    where: str
    measured: float
    error: float
    target: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.measured <= self.target if self.at_most else self.measured >= self.target


def _line(what: str, where: str, values: Sequence[float], target: float, at_most: bool) -> Line:
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Line(what, where, float(np.mean(values)), error, target, at_most)


def lines(replications: int, seed: int) -> Iterator[Line]:
    """Every target, measured."""
    for design in ("prod", "one"):
        for condition in CONDITIONS:
            for seeds in (3, 5, 10):
                found = list(outcomes(design, seeds, condition, replications, seed))
                where = f"{design}, n = {seeds}, {condition.name}"
                yield _line("anything false asserted", where, [not one.clean for one in found], condition.limit, True)
                yield _line("all contrasts covered", where, [one.covered for one in found], 0.93, False)
                yield _line("best cell covered", where, [one.best for one in found], 0.93, False)
    for design in ("one", "prod", "200"):
        for effects in (0.0, 1.0):
            count = replications if design != "200" else max(replications // 2, 2)
            found = list(outcomes(design, 5, IID, count, seed + 1, effects))
            where = f"{design}, n = 5, iid, effects of sd {effects:g}"
            yield _line("all contrasts covered", where, [one.covered for one in found], 0.93, False)
            yield _line("best cell covered", where, [one.best for one in found], 0.93, False)
    found = list(outcomes("prod", 5, IID, max(replications // 2, 2), seed + 2, shift=2.0))
    yield _line("power, effects of 2 run-sd", "prod, n = 5, iid", [one.found for one in found], 0.40, False)


def growing(replications: int, seed: int) -> Iterator[Line]:
    """Targets of studies that are extended after a look."""
    for design, first, added in (("one", 3, 3), ("one", 5, 5), ("prod", 3, 3)):
        for condition in (IID, CONDITIONS[2], CONDITIONS[4]):
            for spending in ("obrien_fleming", "pocock", None):
                found = list(extended(design, first, added, condition, replications, seed, spending=spending))
                where = (
                    f"{design}, {first} + {added} seeds where open, {condition.name}, {spending or 'all at each look'}"
                )
                limit = 0.07 if spending else 1.0
                yield _line("anything false at either look", where, [not one.clean for one in found], limit, True)


def main(arguments: Any = None) -> None:
    """Print a table of all targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replications", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    console = Console(width=120)
    table = Table("what", "where", "measured", "± se", "target", "met")
    for line in chain(lines(options.replications, options.seed), growing(options.replications, options.seed)):
        bound = f"{'≤' if line.at_most else '≥'} {line.target:.2f}"
        row = (line.what, line.where, f"{line.measured:.3f}", f"{line.error:.3f}", bound, "yes" if line.met else "NO")
        console.print(" | ".join(row))
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
