"""The trackers: TensorBoard, Weights & Biases, MLflow and trackio, each as a place to which a cell's numbers go.

A tracked run stands for one cell, under a name that never changes; its group is the configuration, and its project the
study. All packages are optional, and imported only here.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from klab.grid import UserError

EXTRAS = {"tensorboard": "track", "wandb": "track", "mlflow": "track", "trackio": "track"}
"""Tracker -> the extra of klab that installs it."""


class Sink(Protocol):
    """Where a cell's numbers go."""

    def log(self, update: int, values: Mapping[str, float]) -> None:
        """The numbers of one update; updates come in order. One that the tracker has already is left out."""

    def end(self, state: str, update: int, values: Mapping[str, float]) -> None:
        """How the cell ended, and its final numbers."""


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of a cell.

    Attributes:
        study: name of the run folder's grid.
        group: the configuration, without its seed.
        cell: id of the cell.
        identity: what stands for the cell at the tracker, for ever.
        config: all settings of the cell.
        folder: for what is written on this machine.
    """

    study: str
    group: str
    cell: str
    identity: str
    config: Mapping[str, Any]
    folder: Path

    @property
    def flat(self) -> dict[str, str]:
        """The settings by dotted keys, as text."""
        return dict(_flat("", self.config))


def _flat(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif value is not None:
        yield prefix, str(value)


class _Events:
    """TensorBoard's event files."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, update: int, values: Mapping[str, float]) -> None:
        summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
        event = import_module("tensorboard.compat.proto.event_pb2").Event
        scalars = [summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.add_event(event(step=update, summary=summary(value=scalars)))

    def end(self, state: str, update: int, values: Mapping[str, float]) -> None:
        self.log(update, values)


@contextmanager
def tensorboard(cell: Tracked) -> Iterator[Sink]:
    """Event files below the report folder, one folder per configuration and seed."""
    module = _needed("tensorboard.summary.writer.event_file_writer", "tensorboard")
    writer = module.EventFileWriter(str(cell.folder / cell.group / f"seed-{cell.config['seed']}"))
    try:
        yield _Events(writer)
    finally:
        writer.close()


class _Wandb:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, update: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=update)

    def end(self, state: str, update: int, values: Mapping[str, float]) -> None:
        self.run.summary.update({**values, "state": state, "updates": update})


@contextmanager
def wandb(cell: Tracked) -> Iterator[Sink]:
    """Weights & Biases; without a key or `WANDB_MODE` it is written offline, to be sent with `wandb sync`."""
    module = _needed("wandb", "wandb")
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    tracked = module.init(
        project=cell.study,
        id=cell.identity,
        group=cell.group,
        name=cell.cell,
        config=dict(cell.config),
        dir=str(cell.folder),
        mode=mode,
        resume="allow" if mode == "online" else None,
        settings=module.Settings(silent=True, console="off"),
    )
    try:
        yield _Wandb(tracked)
    finally:
        tracked.finish()


class _Mlflow:
    def __init__(self, client: Any, entities: Any, run: Any) -> None:
        self.client, self.entities, self.run = client, entities, run
        self.known: dict[str, set[int]] = {}

    def log(self, update: int, values: Mapping[str, float]) -> None:
        missing = {name: value for name, value in values.items() if update not in self._steps(name)}
        if missing:
            at = int(time.time() * 1000)
            metrics = [self.entities.Metric(name, value, at, update) for name, value in missing.items()]
            self.client.log_batch(self.run.info.run_id, metrics=metrics)

    def _steps(self, name: str) -> set[int]:
        """The updates for which the server has this number."""
        if name not in self.known:
            found = set()
            if name in self.run.data.metrics:
                found = {each.step for each in self.client.get_metric_history(self.run.info.run_id, name)}
            self.known[name] = found
        return self.known[name]

    def end(self, state: str, update: int, values: Mapping[str, float]) -> None:
        self.log(update, values)
        self.client.set_tag(self.run.info.run_id, "klab.state", state)
        self.client.set_terminated(self.run.info.run_id, "FAILED" if state == "failed" else "FINISHED")


@contextmanager
def mlflow(cell: Tracked) -> Iterator[Sink]:
    """MLflow at `MLFLOW_TRACKING_URI`; without one its files lie in the report folder."""
    client_module = _needed("mlflow.tracking", "mlflow")
    entities = import_module("mlflow.entities")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        cell.folder.mkdir(parents=True, exist_ok=True)
        uri = cell.folder.as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # from 3.7 on files have to be asked for
    client = client_module.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(cell.study)
    number = experiment.experiment_id if experiment is not None else client.create_experiment(cell.study)
    found = client.search_runs([number], f"tags.`klab.id` = '{cell.identity}'", max_results=1)
    if found:
        run = found[0]
        if run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
    else:
        tags = {"klab.id": cell.identity, "klab.study": cell.study, "klab.group": cell.group, "klab.cell": cell.cell}
        run = client.create_run(number, tags=tags, run_name=cell.cell)
        params = [entities.Param(name, text[:500]) for name, text in cell.flat.items()]
        for start in range(0, len(params), 100):
            client.log_batch(run.info.run_id, params=params[start : start + 100])
    yield _Mlflow(client, entities, run)


class _Trackio:
    def __init__(self, run: Any) -> None:
        self.run = run
        self.after = int(getattr(run, "_next_step", 0)) - 1  # what it read of the run when it resumed it

    def log(self, update: int, values: Mapping[str, float]) -> None:
        if update > self.after:
            self.run.log(dict(values), step=update)

    def end(self, state: str, update: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "final/state": state}, step=update)


@contextmanager
def trackio(cell: Tracked) -> Iterator[Sink]:
    """trackio, in its own folder on this machine (`TRACKIO_DIR`) or where its variables send it."""
    module = _needed("trackio", "trackio")
    with contextlib.redirect_stdout(sys.stderr):
        run = module.init(
            project=cell.study,
            name=cell.cell,
            group=cell.group,
            config={"klab_id": cell.identity, **cell.flat},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        try:
            yield _Trackio(run)
        finally:
            module.finish()  # of its current run, so that nothing is left for the end of this process


SINKS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}


def opened(tracker: str, cell: Tracked) -> AbstractContextManager[Sink]:
    """Where the numbers of a cell go at this tracker.

    Raises:
        UserError: its package is not installed.
    """
    return SINKS[tracker](cell)


def _needed(module: str, tracker: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        hint = f"pip install 'klab[{EXTRAS[tracker]}]'"
        raise UserError("is not installed", key="track", value=tracker, hint=hint) from error
