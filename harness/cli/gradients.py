"""`klab gradients`: how far a cell's expected gradient is from the true one, how noisy, and what drift does to it."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grid import Cell, Mistake, Objective, load_grid

if TYPE_CHECKING:
    from harness.exact.survey import Entry

COLUMNS = (
    "group",
    "drift",
    "kl",
    "bias",
    "cosine",
    "bias_fitted",
    "variance",
    "ess",
    "mse",
    "standard_error",
    "method",
)
"""Columns of the terminal table; --json and --csv have all of `Entry.row`."""


def gradients(
    target: Annotated[
        str | None, typer.Argument(metavar="GRID|ALGORITHM", help="A grid file, or the name of an algorithm.")
    ] = None,
    kl_table: Annotated[
        bool, typer.Option("--kl-table", help="Instead: exact relative errors of k1, k2, k3 by placement and ratio.")
    ] = False,
    product: Annotated[
        Path | None,
        typer.Option(
            "--product", help="Instead: measure all 55,440 combinations of the main axes into this jsonl file."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random state of policies, reward, drift and draws.")] = 0,
    vocabulary: Annotated[int, typer.Option(min=2, help="Symbols V of the tabular policy.")] = 3,
    horizon: Annotated[int, typer.Option(min=1, help="Steps H of the tabular policy.")] = 3,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="Trajectories of a group; default: the cell's own (4 with --product).")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Trajectories of each Monte Carlo estimate.")] = 8_000,
    drift: Annotated[
        list[float] | None, typer.Option(help="Standard deviation of a random drift; may be repeated.")
    ] = None,
    updates: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of inner updates of the cell; may be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of --product.")] = 1,
    run: Annotated[Path | None, typer.Option(help="Run folder that gets gradients.json for its report.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the table to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print bias, cosine, variance, effective sample size and error of each cell's gradient, with and without drift."""
    import torch

    torch.set_num_threads(1)
    if kl_table:
        rows = _kl_rows(seed, vocabulary, horizon, drift)
        columns: Sequence[str] = ("estimator", "placement", "ratio", "drift", "error", "cosine")
    elif product is not None:
        rows = _product_rows(product, seed, vocabulary, horizon, drift, group_size, samples, workers)
        columns = ()
    else:
        if target is None:
            raise Mistake("name a grid file or an algorithm, or ask for --kl-table or --product FILE")
        rows = _survey_rows(target, seed, vocabulary, horizon, drift, updates, group_size, samples)
        columns = COLUMNS
    if run is not None:
        _write_run(run, rows)
    if csv_file is not None:
        _write_csv(csv_file, rows)
    if as_json:
        typer.echo(json.dumps({"schema": 1, "rows": rows}))
    elif kl_table:
        _print_kl(rows)
    elif columns:
        _print(rows, columns)
    else:
        typer.echo(f"{len(rows)} combinations measured; one line per canonical form in {product}")


def configurations(target: str, group_size: int | None = None) -> dict[str, tuple[Objective, int]]:
    """Objective and group size of each configuration of a grid file, or of one named algorithm.

    Raises:
        Mistake: `target` is neither a file nor an algorithm.
    """
    if Path(target).suffix in (".yaml", ".yml") or Path(target).exists():
        found: dict[str, Cell] = {}
        for cell in load_grid(target).cells:
            found.setdefault(cell.group, cell)
        return {group: (cell.objective, group_size or cell.training.group_size) for group, cell in found.items()}
    from grid.algorithms import load_algorithm

    return {target: (Objective(**load_algorithm(target).objective), group_size or 8)}


def _survey_rows(
    target: str, seed: int, vocabulary: int, horizon: int, drifts: Sequence[float] | None,
    updates: Sequence[int] | None, group_size: int | None, samples: int,
) -> list[dict[str, Any]]:  # fmt: skip
    from harness.exact.bench import Instance
    from harness.exact.survey import INNER_UPDATES, RANDOM_DRIFTS, survey

    entries: list[Entry] = survey(
        configurations(target, group_size),
        instance=Instance(vocabulary, horizon, seed),
        random_drifts=RANDOM_DRIFTS if drifts is None else drifts,
        inner_updates=INNER_UPDATES if updates is None else updates,
        samples=samples,
        progress=_progress,
    )
    return [entry.row() for entry in entries]


def _kl_rows(seed: int, vocabulary: int, horizon: int, drifts: Sequence[float] | None) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from harness.exact.bench import Instance
    from harness.exact.kl_errors import kl_errors

    return [asdict(entry) for entry in kl_errors(Instance(vocabulary, horizon, seed), drifts or (0.0, 0.3))]


def _product_rows(
    file: Path, seed: int, vocabulary: int, horizon: int, drifts: Sequence[float] | None, group_size: int | None,
    samples: int, workers: int,
) -> list[dict[str, Any]]:  # fmt: skip
    from harness.exact.sweep import Plan, sweep

    size = group_size or 4
    plan = Plan(vocabulary, horizon, seed, drifts[0] if drifts else 0.3, size, max(2, samples // size))
    return sweep(file, plan=plan, workers=workers, progress=_progress)


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{total}" + ("\n" if done == total else ""))
        sys.stderr.flush()


def _write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _write_run(run: Path, rows: Sequence[dict[str, Any]]) -> None:
    from harness.store import Run, files

    files.replace(Run.open(run).path / "gradients.json", files.seal({"rows": list(rows)}))


def _print(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title="Gradient of each cell against the gradient of E[R] − β·KL", row_styles=("", "dim"))
    for row in rows:
        table.add_row(*(_shown(row[column]) for column in columns))
    Console().print(table)


def _print_kl(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    for drift in dict.fromkeys(row["drift"] for row in rows):
        name = "on-policy" if drift == 0 else f"random drift {drift:g}"
        table = Table("estimator", "placement", *ratios, title=f"Relative error of the KL gradient, exact, {name}")
        here = [row for row in rows if row["drift"] == drift]
        for estimator, placement in dict.fromkeys((row["estimator"], row["placement"]) for row in here):
            errors = {
                r["ratio"]: r["error"] for r in here if (r["estimator"], r["placement"]) == (estimator, placement)
            }
            table.add_row(estimator, placement, *(_shown(errors[ratio]) for ratio in ratios))
        Console().print(table)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return "0" if abs(value) < 1e-12 else f"{value:.3g}"
    return "–" if value is None else str(value)
