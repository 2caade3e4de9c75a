"""Evaluations of a finished policy by lm-evaluation-harness, recorded task by task in the cell's `lm_eval.json`."""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from klab.grid import user_code
from klab.grid.errors import UserError
from klab.grid.schema.evaluate import Evaluations
from klab.harness.store import CellFolder, files
from klab.tasks.packages import require_package

RECORD = "lm_eval.json"
_POLL_SECONDS = 0.5
_CHUNK = 1 << 22


def require_lm_eval(evaluations: Evaluations) -> None:
    """Raises UserError where lm-evaluation-harness is not installed."""
    require_package("lm_eval", "lm_eval", "evaluate.lm_eval", ", ".join(evaluations.lm_eval))


def evaluate_policy(
    folder: CellFolder, evaluations: Evaluations, device: str, stop: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """Evaluate a cell's saved policy on what is not recorded of it yet, and record each task when it is done.

    A recorded task counts as long as the policy and the settings are the ones it was made with.

    Args:
        device: of the policy in training, `cpu` or `cuda`.
        stop: asked all the time; once it is true, the process is ended.

    Returns:
        What the cell's result says: `lm_eval`, the metrics by `task.metric` or `task.metric.filter`; where a task
        failed, `lm_eval_failed`, the tasks with the last line of the reason. None if it was stopped.
    """
    made_with = {"policy": _digest(folder.policy), "settings": _settings(evaluations)}
    record = _recorded(folder, made_with)
    record["tasks"] = {task: found for task, found in record["tasks"].items() if _is_kept(task, found)}
    waiting = [task for task in evaluations.lm_eval if task not in record["tasks"]]
    try:
        require_lm_eval(evaluations)
        whole = not waiting or _run(folder, evaluations, device, waiting, record, stop)
    except (UserError, OSError) as error:
        record["tasks"] |= {task: {"error": str(error)} for task in waiting}
        whole = True
    files.replace(folder.path / RECORD, files.encode_record(record, indent=2))
    return _summary(record) if whole else None


def _run(
    folder: CellFolder,
    evaluations: Evaluations,
    device: str,
    waiting: list[str],
    record: dict[str, Any],
    stop: Callable[[], bool],
) -> bool:
    """Evaluate in a process of its own; whether it came to its end."""
    policy = folder.resolved()["policy"]
    request = {
        **evaluations.model_dump(mode="json"),
        "policy": str(folder.policy),
        "device": device if evaluations.device == "auto" else "cpu",
        "trust_remote_code": bool(policy.get("trust_remote_code", False)),
    }
    limit = None if evaluations.minutes is None else 60.0 * evaluations.minutes
    while waiting:
        began = time.monotonic()
        process = subprocess.Popen(
            user_code.python_command("-m", "klab.harness.training.lm_eval_process"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # how it ended is seen below
                process.stdin.write(json.dumps({**request, "tasks": waiting}).encode() + b"\n")
                process.stdin.flush()
            buffer = b""
            while waiting:
                if stop():
                    return False
                if limit is not None and time.monotonic() - began > limit:
                    _keep(folder, record, waiting.pop(0), {"error": f"took longer than {evaluations.minutes} minutes"})
                    break
                if not select.select([process.stdout], [], [], _POLL_SECONDS)[0]:
                    continue
                chunk = os.read(process.stdout.fileno(), 65536)
                buffer += chunk
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    found = json.loads(line)
                    waiting.remove(found["task"])
                    _keep(folder, record, found.pop("task"), found)
                    began = time.monotonic()
                if not chunk and waiting:
                    _keep(folder, record, waiting.pop(0), {"error": f"the process ended with {process.wait()}"})
                    break
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
    return True


def _keep(folder: CellFolder, record: dict[str, Any], task: str, found: Mapping[str, Any]) -> None:
    """Record what a task gave, or why it gave nothing."""
    folder.assert_owner()
    record["tasks"][task] = {**found, **_file(task)}
    files.replace(folder.path / RECORD, files.encode_record(record, indent=2))
    if "error" in found:
        print(f"klab: {folder.id}: evaluation on {task} failed:\n{found['error']}", file=sys.stderr, flush=True)


def _recorded(folder: CellFolder, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the cell where it has one of this policy and these settings, else a new one."""
    with suppress(UserError):
        found = files.read_record(folder.path / RECORD)
        if found is not None and all(found.get(key) == value for key, value in made_with.items()):
            return found
    return {**made_with, "versions": {"lm_eval": _version()}, "tasks": {}}


def _version() -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("lm_eval")
    return None


def _summary(record: Mapping[str, Any]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for found in record["tasks"].values():
        metrics.update(found.get("metrics", {}))
    failed = {
        task: found["error"].strip().splitlines()[-1] for task, found in record["tasks"].items() if "error" in found
    }
    return {"lm_eval": metrics, **({"lm_eval_failed": failed} if failed else {})}


def _settings(evaluations: Evaluations) -> dict[str, Any]:
    """What an evaluation depends on besides policy and task."""
    return evaluations.model_dump(mode="json", include={"limit", "fewshot", "batch_size", "chat_template"})


def _file(task: str) -> dict[str, str | None]:
    """The digest of a task's file, where it has one of its own."""
    return {"sha256": _digest(Path(task))} if task.endswith((".yaml", ".yml")) else {}


def _is_kept(task: str, found: Mapping[str, Any]) -> bool:
    """Whether what is recorded of a task is what it would give again."""
    return "metrics" in found and found.get("sha256") == _file(task).get("sha256")


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, or of a folder's files; None where there is none."""
    digest = hashlib.sha256()
    try:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()
