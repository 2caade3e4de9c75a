"""`klab gradients`: how far a cell's expected gradient is from the true one, how noisy, and what drift does to it."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from klab.grid import Cell, Objective, UserError, user_code
from klab.harness.cli.arguments import STUDIES, JsonOption, grid_of, run_of
from klab.harness.cli.table import show
from klab.harness.cli.text import say, show_json
from klab.harness.exact.drift_names import AS_TRAINED, ON_POLICY, is_own
from klab.harness.store import Run, files
from klab.harness.store.archive import Archive

if TYPE_CHECKING:
    from klab.harness.exact.gradient_table import Observed

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
"""Columns on the screen; --json and --csv have all of `Entry.row`."""

MOST = 2_000
"""Most configurations of one survey: some minutes."""

SAMPLES = 8_000
"""Trajectories of each Monte Carlo estimate."""

Rows = list[dict[str, Any]]


class Measured(NamedTuple):
    """What is measured of a configuration: its objective and group size, whether its schedule is on-policy, and whether
    its reference is the policy that drew the rollout."""

    objective: Objective
    group_size: int
    on_policy: bool = False
    drawn_reference: bool = False


def gradients(
    target: Annotated[
        str | None,
        typer.Argument(metavar="GRID|ALGORITHM|RUN", help="A grid file or study, a named algorithm, or a run."),
    ] = None,
    kl_table: Annotated[
        bool, typer.Option("--kl-table", help="Instead: exact errors of estimators by placement and ratio.")
    ] = False,
    divergence: Annotated[
        list[str] | None,
        typer.Option(help="Divergence of --kl-table; may be repeated; default: reverse."),
    ] = None,
    product: Annotated[
        Path | None,
        typer.Option(
            "--product", metavar="FILE", help="Instead: the product of the main axes, into a resumable jsonl file."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random state of policies, reward, drift and draws.")] = 0,
    vocabulary: Annotated[int, typer.Option(min=2, help="Symbols V of the tabular policy.")] = 3,
    horizon: Annotated[int, typer.Option(min=1, help="Steps H of the tabular policy.")] = 3,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="Trajectories of a group; default: the cell's (4 with --product).")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Trajectories of each Monte Carlo estimate.")] = SAMPLES,
    drift: Annotated[
        list[float] | None, typer.Option(min=0.0, help="Standard deviation of a random drift; may be repeated.")
    ] = None,
    updates: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of inner updates of the cell; may be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of --product.")] = 1,
    run: Annotated[str | None, typer.Option(help="The run whose report gets these rows.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Also write them as CSV.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure bias, cosine, variance, effective sample size and error of cells' gradients, exactly where feasible."""
    import torch

    torch.set_num_threads(1)
    if kl_table:
        rows = _kl_rows(seed, vocabulary, horizon, drift, divergence or ["reverse"])
    elif product is not None:
        rows = _product_rows(product, seed, vocabulary, horizon, drift, group_size, samples, workers)
    elif target is not None:
        cells, owner = _cells(target)
        if len(cells) > MOST:
            raise UserError(
                f"has {len(cells)} configurations, each measured in several settings; at most {MOST} at a time",
                value=target,
                hint="--product FILE measures all combinations once, and continues where it stopped.",
            )
        if group_size is not None:
            cells = {name: each._replace(group_size=group_size) for name, each in cells.items()}
        seen = _observed(owner) if owner is not None and updates is None and drift is None else {}
        with _user_code(target, owner):
            rows = _survey_rows(cells, seed, vocabulary, horizon, drift, updates, samples, seen)
        owner = run_of(run) if run is not None else owner
        if owner is not None:
            _keep(owner, rows, cells)
    else:
        raise UserError("name a grid file, an algorithm or a run, or ask for --kl-table or --product FILE")
    if csv_file is not None:
        _write_csv(csv_file, rows)
    if as_json:
        show_json({"schema": 1, "rows": rows})
    elif kl_table:
        _show_kl(rows)
    elif product is not None:
        say(f"{len(rows)} combinations measured; one line per canonical form in {product}")
    else:
        show(COLUMNS, [[row[column] for column in COLUMNS] for row in rows], "Against the gradient of E[R] − β·KL")


def measure_run(run: Run, most: int, own_code: bool = False) -> None:
    """Measure a run's configurations for its report, unless that was done before or they are more than ``most``. An
    archive has what was measured before.

    Args:
        own_code: measure those with the user's own functions too, which are imported and called.
    """
    if isinstance(run, Archive) or ((run.report / "gradients.json").exists() and not own_code):
        return
    cells = _by_group([Cell.from_resolved(run.resolved(identity)) for identity in run.cells])
    cells = {name: each for name, each in cells.items() if own_code or not each.objective.is_custom}
    if not 0 < len(cells) <= most:
        return
    import torch

    torch.set_num_threads(1)
    with user_code.searching(known=run.user_code() if own_code else None):
        rows = _survey_rows(cells, 0, 3, 3, None, None, SAMPLES, _observed(run))
    _keep(run, rows, cells)


def _cells(target: str) -> tuple[dict[str, Measured], Run | None]:
    """What is measured, by configuration; and the run, if it is one."""
    from klab.grid.algorithms import algorithm_names, load_algorithm

    if (Path(target) / "manifest.json").exists():
        run = Run.open(target)
        return _by_group([Cell.from_resolved(run.resolved(identity)) for identity in run.cells]), run
    if Path(target).exists() or (STUDIES / f"{target}.yaml").exists():
        return _by_group(grid_of(target).cells), None
    if target in algorithm_names():
        return {target: Measured(Objective(**load_algorithm(target).objective), 8)}, None
    studies = [path.stem for path in STUDIES.glob("*.yaml")]
    raise UserError(
        "neither a file, a study, an algorithm nor a run", key="GRID|ALGORITHM|RUN", value=target,
        allowed=sorted({*algorithm_names(), *studies}),
    )  # fmt: skip


def _user_code(target: str, run: Run | None) -> AbstractContextManager[None]:
    """Find user code where the run has it, or relative to the grid file."""
    if run is not None:
        return user_code.searching(known=run.user_code())
    return user_code.searching(Path(target).parent if Path(target).is_file() else None)


def _by_group(cells: Sequence[Cell]) -> dict[str, Measured]:
    return {cell.group: _measured(cell) for cell in reversed(cells)}


def _measured(cell: Cell) -> Measured:
    training = cell.training
    drawn = training.reference is not None and training.reference.follows == "rollout"
    return Measured(cell.objective, training.group_size, training.on_policy, drawn)


def _survey_rows(
    configurations: dict[str, Measured], seed: int, vocabulary: int, horizon: int,
    drifts: Sequence[float] | None, updates: Sequence[int] | None, samples: int, observed: Mapping[str, Observed],
) -> Rows:  # fmt: skip
    from klab.harness.exact.gradient_table import INNER_UPDATES, RANDOM_DRIFTS, gradient_table
    from klab.harness.exact.instance import Instance

    entries = gradient_table(
        {name: each[:2] for name, each in reversed(configurations.items())},
        instance=Instance(vocabulary, horizon, seed),
        random_drifts=RANDOM_DRIFTS if drifts is None else drifts,
        inner_updates=INNER_UPDATES if updates is None else updates,
        samples=samples,
        observed=observed,
        referring_to_behaviour={name for name, each in configurations.items() if each.drawn_reference},
        progress=_progress,
    )
    return [entry.row() for entry in entries]


def _observed(run: Run) -> dict[str, Observed]:
    """By configuration whose rollouts serve several updates, the drift that its metrics show; means over its seeds."""
    from klab.harness.exact.gradient_table import Observed

    sums: dict[str, list[float]] = {}
    inner: dict[str, int] = {}
    for identity in run.cells:
        cell = run.cell(identity)
        drifts = [row["kl_behaviour"] for row in cell.metrics() if row.get("kl_behaviour") is not None]
        configuration = cell.cell()
        if configuration.training.on_policy or not drifts:
            continue
        sums.setdefault(configuration.group, []).append(sum(drifts) / len(drifts))
        inner[configuration.group] = max(1, configuration.training.optimizer_steps_per_rollout - 1)
    return {group: Observed(inner[group], sum(found) / len(found)) for group, found in sums.items()}


def _kl_rows(
    seed: int, vocabulary: int, horizon: int, drifts: Sequence[float] | None, divergences: Sequence[str]
) -> Rows:
    from klab.grid.catalogue import AXES
    from klab.harness.exact.instance import Instance
    from klab.harness.exact.kl_errors import kl_errors

    known = AXES["divergence"].values
    for name in divergences:
        if name not in known:
            raise UserError("unknown divergence", key="--divergence", value=name, allowed=known)
    instance = Instance(vocabulary, horizon, seed)
    return [asdict(entry) for entry in kl_errors(instance, drifts or (0.0, 0.3), divergences)]


def _product_rows(
    file: Path, seed: int, vocabulary: int, horizon: int, drifts: Sequence[float] | None, group_size: int | None,
    samples: int, workers: int,
) -> Rows:  # fmt: skip
    from klab.harness.exact.product_sweep import SweepPlan, sweep

    size = group_size or 4
    plan = SweepPlan(vocabulary, horizon, seed, drifts[0] if drifts else 0.3, size, max(2, samples // size))
    return sweep(file, plan=plan, workers=workers, progress=_progress)


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done} of {total}" + ("\n" if done == total else ""))
        sys.stderr.flush()


def _keep(run: Run, rows: Rows, cells: dict[str, Measured]) -> None:
    """Leave the rows for the run's report, which reads the first of each configuration: that of its own schedule."""

    def distance(row: dict[str, Any]) -> int:
        if cells[row["group"]].on_policy:
            return 0 if row["drift"] == ON_POLICY else 1
        return 0 if row["drift"] == AS_TRAINED else 1 if is_own(str(row["drift"])) else 2

    folder = run.output_folder("report")
    folder.mkdir(exist_ok=True)
    files.replace(folder / "gradients.json", files.encode_record({"rows": sorted(rows, key=distance)}))


def _write_csv(file: Path, rows: Rows) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _show_kl(rows: Rows) -> None:
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    for drift, divergence in dict.fromkeys((row["drift"], row["divergence"]) for row in rows):
        errors = {
            (row["estimator"], row["placement"], row["ratio"]): row["error"]
            for row in rows
            if (row["drift"], row["divergence"]) == (drift, divergence)
        }
        lines = [
            (estimator, placement, *(_rounded(errors[estimator, placement, ratio]) for ratio in ratios))
            for estimator, placement in dict.fromkeys(key[:2] for key in errors)
        ]
        where = "on-policy" if drift == 0 else f"after random drift of {drift:g}"
        of = "∇KL(π‖π_ref)" if divergence == "reverse" else f"the gradient of the divergence {divergence}"
        title = f"Relative error of the expected gradient of the KL term against {of}, {where}; 0 is exact"
        show(("estimator", "placement", *ratios), lines, title)


def _rounded(error: float) -> float:
    return 0.0 if error < 1e-12 else error
