"""lm-evaluation-harness on a saved policy, in a process of its own: `python -m klab.harness.training.lm_eval_process`.

The request is a line of JSON on standard input, which stays open while the answer is wanted; the answers are lines of
JSON, one for each task. What lm-evaluation-harness prints goes to standard error.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from klab.grid.errors import UserError
from klab.tasks.worker import die_with_the_pipe

BOOTSTRAPS = 1000
"""Resamples for the standard errors of metrics that are no means."""


def main() -> None:
    """Evaluate the policy on each task of the request, and say what came out as soon as it is known."""
    request = json.loads(sys.stdin.readline())
    die_with_the_pipe()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model = manager = None
    for task in request["tasks"]:
        began = time.monotonic()
        try:
            manager = manager or task_manager(request["tasks"])
            model = model or load_model(request)
            found: dict[str, Any] = {"task": task, **evaluated(model, manager, task, request)}
        except Exception:
            found = {"task": task, "error": traceback.format_exc()}
        answers.write(json.dumps({**found, "seconds": time.monotonic() - began}) + "\n")
        answers.flush()
    os._exit(0)


def load_model(request: Mapping[str, Any]) -> Any:
    """The policy in lm-evaluation-harness: a folder of transformers, or adapters of PEFT over their base."""
    from lm_eval.models.huggingface import HFLM

    folder = Path(request["policy"])
    adapters = folder / "adapter_config.json"
    base = json.loads(adapters.read_text())["base_model_name_or_path"] if adapters.exists() else str(folder)
    tokenizer = folder if (folder / "tokenizer_config.json").exists() else base
    return HFLM(
        pretrained=base,
        tokenizer=str(tokenizer),
        peft=str(folder) if adapters.exists() else None,
        device=request["device"],
        dtype="auto",
        batch_size=request["batch_size"],
        trust_remote_code=request["trust_remote_code"],
    )


def evaluated(model: Any, manager: Any, task: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """What one task, group or tag gave.

    Returns:
        `metrics` and `errors` (standard errors) of the task, or of the groups, by `task.metric` and, where the metric
        is of filtered answers, `task.metric.filter`; `versions` of the tasks and `documents` of each, by task.
    """
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[task_of(task)],
        num_fewshot=request["fewshot"],
        limit=request["limit"],
        apply_chat_template=request["chat_template"],
        bootstrap_iters=BOOTSTRAPS,
        task_manager=manager,
        log_samples=False,
    )
    if found is None:
        raise RuntimeError("lm_eval.simple_evaluate returned nothing")
    metrics: dict[str, float | None] = {}
    errors: dict[str, float | None] = {}
    for name, values in (found.get("groups") or found["results"]).items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or not isinstance(value, int | float):
                continue
            number = float(value) if math.isfinite(value) else None
            label = ".".join([name, metric.removesuffix("_stderr"), *([] if kind == "none" else [kind])])
            (errors if metric.endswith("_stderr") else metrics)[label] = number
    counted = {name: each["effective"] for name, each in found.get("n-samples", {}).items()}
    return {"metrics": metrics, "errors": errors, "versions": dict(found["versions"]), "documents": counted}


def task_manager(tasks: Iterable[str]) -> Any:
    """What knows the tasks: files alone need no index of the thousands that come with lm-evaluation-harness."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=not all(map(is_file, tasks)))


def is_file(task: str) -> bool:
    """Whether a task is named by its file."""
    return task.endswith((".yaml", ".yml"))


def task_of(task: str) -> str | dict[str, Any]:
    """A task as lm-evaluation-harness takes it: its name, or what its file says."""
    if not is_file(task):
        return task
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(task, resolve_func=True))


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises UserError, with the nearest valid one, where lm-evaluation-harness does not know a task."""
    manager = task_manager(tasks)
    for task in tasks:
        if is_file(task):
            config = task_of(task)
            if not isinstance(config, dict) or not isinstance(config.get("task"), str):
                raise UserError(
                    "the file names no task", key="evaluate.lm_eval", value=task, hint="It needs `task: NAME`."
                )
        elif not manager.match_tasks([task]):
            raise UserError("unknown task", key="evaluate.lm_eval", value=task, allowed=sorted(manager.task_index))


if __name__ == "__main__":
    main()
