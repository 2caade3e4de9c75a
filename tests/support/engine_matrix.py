"""What `training.engine: trl` makes of every axis value and training setting, as Markdown, from the code.

`python -m tests.support.engine_matrix` writes the tables of harness/engines/README.md anew; a test holds them to it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from klab.grid import Cell, UserError, parse_grid
from klab.grid.catalogue import AXES
from klab.grid.engines import SET_BY_KLAB
from klab.grid.schema.training import TrainingSection
from klab.harness.engines.trl.update import has_detached_kl, needs_current_policy
from klab.harness.training.packed_cell import PackedCell

PAGE = Path(__file__).resolve().parents[2] / "harness" / "engines" / "README.md"
_TABLE = re.compile(r"(<!-- (axes|training) on trl -->\n).*?(<!-- /\2 -->)", re.DOTALL)

PROBES: dict[str, Any] = {
    "lag": 1,
    "behaviour": "reference",
    "token_budget": 64,
    "critic": {"kind": "model"},
}
"""Settings that TRL has no place for, each with a value that is refused."""

OWN = {
    "engine": "chooses this engine",
    "trl": "any further field of `GRPOConfig`",
    "prompts": "with `group_size` and `minibatches`: `steps_per_generation`; klab's own engine has the same prompts",
    "behaviour": "refused but for `policy`",
    "sampler": "`use_vllm` and its fields, `engine: vllm` only; factors of tokens are klab's own",
    "equal_groups": "`keep`; `drop` with `minibatches: 1`; `refill` is refused",
    "refill_rounds": "goes with `refill`",
    "truncated": "as klab's own engine: rewards count, tokens do not",
    "overlong_buffer": "as klab's own engine",
    "overlong_penalty": "as klab's own engine",
    "old_logprobs": "TRL's are always the trainer's",
    "beta_control": "as klab's own engine, after every update",
    "reference": "`sync_ref_model`, `ref_model_mixup_alpha` = 1 − `ema`, `ref_model_sync_steps`; refused beside "
    "adapters, FSDP and DeepSpeed; `rollout`: as klab's own engine, but for whole distributions off-policy",
    "trust_region": "as klab's own engine",
    "entropy_control": "as klab's own engine, after every update",
    "max_prompt_tokens": "as klab's own engine",
    "reward_seconds": "as klab's own engine",
    "stop": "as klab's own engine: after evaluations; process 0 decides",
    "group_size": "`num_generations`, 2 at least",
    "minibatches": "`steps_per_generation`; random trajectories, not groups (`klab plan` says so)",
    "micro_batch": "`per_device_train_batch_size`, `gradient_accumulation_steps`, per process",
    "evaluate_every": "as klab's own engine, by klab's code",
    "evaluation_prompts": "as klab's own engine",
    "evaluation_samples": "as klab's own engine",
    "final_evaluation_samples": "as klab's own engine",
    "checkpoint_updates": "`transformers.Trainer`'s checkpoints, where a rollout is used up",
    "checkpoint_seconds": "as `checkpoint_updates`",
}
"""What is not said by `SET_BY_KLAB`."""


def cell_of(objective: dict[str, Any] | None = None, **training: Any) -> Cell:
    """A cell on TRL."""
    written = {"engine": "trl", "updates_per_rollout": 2, **training}
    grid = {"name": "probe", "task": "addition", "training": written, "objective": objective or {}}
    return parse_grid(json.dumps(grid), "probe.yaml").cells[0]


def cost_of(cell: Cell) -> str:
    """What a cell's objective costs beside TRL's own passes."""
    member = PackedCell(cell, None, Path())  # type: ignore[arg-type]
    costs = []
    if member.needs_logits:
        costs.append("logits of a micro-batch instead of the fused head")
    if needs_current_policy(member):
        costs.append("one more forward pass over the rollout per update")
    if member.needs_greedy:
        costs.append("one greedy completion per prompt and rollout")
    if has_detached_kl(member) and not needs_current_policy(member):
        costs.append("with one update per rollout: one more forward pass per rollout")
    return "; ".join(costs) or "nothing more"


def axes_table() -> str:
    """Every axis value."""
    lines = ["| axis | value | what it takes on TRL |", "|---|---|---|"]
    for axis in AXES.values():
        for value in axis.values:
            rest = {"estimator": {"placement": "advantage"}, "path": {"ratio": "sequence_mean"}}.get(axis.name, {})
            try:
                cost = cost_of(cell_of({**rest, axis.name: value}))
            except UserError as error:
                cost = "refused: " + error.problem.rpartition(": ")[2]
            lines.append(f"| `{axis.name}` | `{value}` | {cost} |")
    current = {"placement": "advantage", "kl_at": "current"}
    lines.append(f"| parameter | `kl_at: current` | {cost_of(cell_of(current))} |")
    return "\n".join(lines) + "\n"


def training_table() -> str:
    """Every setting of the training section."""
    lines = ["| setting | on TRL |", "|---|---|"]
    for name in TrainingSection.model_fields:
        fields = [f"`{field}`" for field, setting in SET_BY_KLAB.items() if setting == f"training.{name}"]
        text = OWN.get(name) or ", ".join(fields)
        if name in PROBES and name not in OWN:
            text = "refused"
        assert text, name
        lines.append(f"| `{name}` | {text} |")
    return "\n".join(lines) + "\n"


def is_refused(name: str, value: Any) -> bool:
    """Whether a setting is refused by its name."""
    objective = {"advantage": "gae"} if name == "critic" else {}
    try:
        cell_of(objective, **{name: value})
    except UserError as error:
        return error.key == f"training.{name}"
    return False


def updated(text: str) -> str:
    """A page with its tables as the code has them now."""
    tables = {"axes": axes_table, "training": training_table}
    return _TABLE.sub(lambda match: f"{match[1]}{tables[match[2]]()}{match[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
